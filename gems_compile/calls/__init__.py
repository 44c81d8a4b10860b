"""Eager mode's machinery: how one call of an ATen overload becomes a kernel and is served by it.

``one_op`` stands at the dispatcher and looks calls up, ``one_call`` compiles what was not met yet,
``varying`` lets calls of other sizes share it; ``rules`` and its like say how an op is taken apart.
What users call is in ``gems_compile.eager``.
"""
