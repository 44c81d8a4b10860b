"""The commands of ``python -m gems_compile``, a module each."""
