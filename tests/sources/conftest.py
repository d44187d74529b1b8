"""The recipe of seconds of the loop's tests."""

from tests.practice import conftest

recipe = conftest.recipe
