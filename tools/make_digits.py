"""Make spikegen/assets/digits.npz: the 1,797 handwritten digits that scikit-learn ships, 8x8, values 0..16.

They are the test part of the UCI set "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
1998, CC BY 4.0). Run it as `python tools/make_digits.py`; scikit-learn is needed only here and in the tests.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

OUT = Path(__file__).parents[1] / "spikegen" / "assets" / "digits.npz"

if __name__ == "__main__":
    digits = load_digits()
    np.savez_compressed(OUT, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")
