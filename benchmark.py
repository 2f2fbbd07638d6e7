"""Time a model: python benchmark.py --model beit_base_patch16_224."""

from beitzoo.measure.benchmark import main

if __name__ == "__main__":
    main()
