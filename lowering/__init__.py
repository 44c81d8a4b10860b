"""fx.Graph -> callable: passes, rewrites, fusion, code generation, launch, execution, caches."""
