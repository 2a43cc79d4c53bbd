"""Program-aware KV retention: programs, policies, the plug-in to stock vLLM, and what they learn from."""
