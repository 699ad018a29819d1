"""What several test files share."""

import pytest


@pytest.fixture(scope="module")
def one_thread():
    """For models too small to be worth waking a second thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
