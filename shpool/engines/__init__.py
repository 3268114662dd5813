"""Where tasks run; all engines keep the contract of ``base``."""
