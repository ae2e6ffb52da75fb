"""Adapter folders: PEFT exactly. Reading, writing, and a base model seen through its adapters."""
