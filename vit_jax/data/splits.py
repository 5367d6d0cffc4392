# SPDX-License-Identifier: Apache-2.0
"""Which part of a data set to train and to test on: the same rule for every source."""

import unicodedata
from collections.abc import Iterable, Sequence

from vit_jax.config import DataConfig
from vit_jax.data.examples import Split, held_out
from vit_jax.errors import UserError

TRAIN = ("train", "training")
VALIDATION = ("val", "validation", "valid")
# What stands in for a plain "test", in this order.
TEST = ("test", "testing", *VALIDATION)


def meant(wanted: str, have: Iterable[str]) -> list[str]:
    """Those of the names ``have`` that ``wanted`` may mean, the likeliest first: itself,
    itself in other capitals, and the synonyms of "train", "val" and "test"."""
    key = plain(wanted)
    synonyms = {TRAIN[0]: TRAIN, TEST[0]: TEST} | dict.fromkeys(VALIDATION, VALIDATION)
    order = (key, *synonyms.get(key, ()))
    found = [name for name in have if plain(name) in order]
    return sorted(found, key=lambda name: (name != wanted, order.index(plain(name))))


def plain(name: str) -> str:
    """A name without what hardly tells names apart: capitals and spellings of accents."""
    return unicodedata.normalize("NFC", name).casefold()


def with_test(cfg: DataConfig, train: Split, test: Split | None) -> tuple[Split, Split]:
    """(train, test), where a share of the training set stands in for a missing test."""
    if test is not None:
        return train, test
    rest, out = held_out(train, cfg.test_share)
    return train.select(rest), train.select(out)


def missing(knob: str, name: str, where: object, have: Sequence[str]) -> UserError:
    """``knob`` names a split that there is not."""
    rest = ""
    default = getattr(DataConfig, knob, name)
    if name != default:
        rest = f"; only the default, {default!r}, stands for whichever there is"
    return UserError(f"{wish(knob, name)}, but {where} has {some(have)}{rest}")


def wish(knob: str, name: str) -> str:
    """For messages: what asks for a split; not only the config does."""
    if knob in _KNOBS:
        return f"config.data.{knob} is {name!r}"
    return f"the split {name!r} is asked for"


_KNOBS = ("train_split", "test_split")


def some(names: Sequence[str]) -> str:
    """A list of names, cut after ten."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return str(list(names[:10])) + more
