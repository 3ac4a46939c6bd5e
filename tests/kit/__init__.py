"""What the tests share with each other and with scripts/fuzz-pool and scripts/fsx."""

import pkgutil

import pytest

# An assertion in here shall say as much when it fails as one in a test does.
pytest.register_assert_rewrite(*(module.name for module in pkgutil.iter_modules(__path__, "kit.")))
