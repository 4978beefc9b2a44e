"""Everything that knows llama.cpp: its tools, its converter and its build."""
