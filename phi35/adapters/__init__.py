"""Adapters: LoRA on the modules of this package, by PEFT where PEFT has it; see ``phi35.adapters.inject``."""
