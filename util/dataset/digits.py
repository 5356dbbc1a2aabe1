"""scikit-learn's handwritten digits, of which DIGITS and DIGITS_DVS are made, and the split that both have.

scikit-learn is imported when they are read: that takes longer than reading them, and other data sets do without.
"""

import numpy as np

CLASSES = [str(digit) for digit in range(10)]


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8], ink from 0 to 16, and labels [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


def split_digits(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of those to train on, four of five, and of those to test on, each class shared alike."""
    from sklearn.model_selection import train_test_split

    return train_test_split(np.arange(len(labels)), stratify=labels, test_size=0.2, random_state=0)
