"""Fine-tuning LoRA adapters on a frozen base: data and masks, the quantized base, one loop, exact resume, a memory estimate."""
