"""What tells of compiles: facts, reports, dumps and logs, and the checks beside kernels.

``summary`` and ``plan`` make plain data of a compiled graph, ``dump_files`` writes it, ``verify``
and ``replay`` run kernels beside their references. What users call is ``gems_compile.explain``,
``gems_compile.dump`` and the options.
"""
