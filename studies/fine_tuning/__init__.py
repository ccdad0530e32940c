"""Fine-tuning and LoRA by code that knows nothing of this library, watched from beside: does the verdict come before copies?"""
