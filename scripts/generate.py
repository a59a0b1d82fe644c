"""The command tsp-generate, from a clone: continue a text with a Hugging Face model, on any layout.

python scripts/generate.py models/smollm2 --prompt "What is gravity?" --chat --mesh tsp=8 --cpu-devices 8
python scripts/generate.py MODEL --prompt-file book.txt --layout tp_sp --mesh model=2,seq=4 --max-new-tokens 256
"""

from tsp_jax.tools.generate import main

if __name__ == "__main__":
    main()
