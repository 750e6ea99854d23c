"""Optimizers from torch, bitsandbytes and DeepSpeed, each with what it supports under ZeRO."""
