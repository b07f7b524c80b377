"""The people, the ads and the requests of the simulator: who is shown what, when, before anybody clicks."""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

SLATE = 8
DAYS = 28
DAY_MS, HOUR_MS = 86_400_000, 3_600_000
LATENT = 8

GENDERS = ("F", "M")
AGES = ("18-24", "25-34", "35-44", "45-54", "55+")
COUNTRIES = ("US", "DE", "FR", "BR", "IN", "JP")
DEVICES = ("mobile", "desktop", "tablet")
CATEGORIES = (
    "autos", "books", "fashion", "finance", "food", "games", "health", "home", "music", "sports", "tech", "travel",
)  # fmt: skip
TAGS = (
    "bundle", "eco", "family", "free_shipping", "gift", "limited", "local", "new", "premium", "sale", "trial", "video",
)  # fmt: skip

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Rng = np.random.Generator

# U users, N ads, R requests, S slots of a slate, K categories, G tags, D latent width


@dataclass(frozen=True, kw_only=True)
class Users:
    gender: Ints  # [U]
    age: Ints  # [U]
    country: Ints  # [U]
    interest: Ints  # [U] the category they would name
    declared: Bools  # [U] whether they did
    affinity: Floats  # [U, K]
    latent: Floats  # [U, D]

    @classmethod
    def draw(cls, rng: Rng, num: int) -> "Users":
        """Everyone likes what their gender and age like, one interest above all, and something of their own."""
        gender_U, age_U = rng.integers(len(GENDERS), size=num), rng.integers(len(AGES), size=num)
        interest_U = rng.integers(len(CATEGORIES), size=num)
        affinity_UK = (
            rng.normal(0, 0.5, (len(GENDERS), len(CATEGORIES)))[gender_U]
            + rng.normal(0, 0.5, (len(AGES), len(CATEGORIES)))[age_U]
            + rng.normal(0, 0.3, (num, len(CATEGORIES)))
        )
        affinity_UK[np.arange(num), interest_U] += 1.0
        return cls(
            gender=gender_U,
            age=age_U,
            country=rng.choice(len(COUNTRIES), size=num, p=(0.4, 0.2, 0.15, 0.1, 0.1, 0.05)),
            interest=interest_U,
            declared=rng.random(num) < 0.7,
            affinity=affinity_UK,
            latent=rng.normal(0, 0.5 * LATENT**-0.25, (num, LATENT)),
        )

    def table(self) -> pl.DataFrame:
        """What an ad server knows of them."""
        interest_U = np.where(self.declared, self.interest, -1)
        return pl.DataFrame(
            {
                "id": names("u", len(self.gender)),
                "gender": np.array(GENDERS)[self.gender],
                "age": np.array(AGES)[self.age],
                "country": np.array(COUNTRIES)[self.country],
                "interest": pl.Series([CATEGORIES[i] if i >= 0 else None for i in interest_U], dtype=pl.String),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Ads:
    category: Ints  # [N]
    advertiser: Ints  # [N]
    price: Floats  # [N]
    tags: Bools  # [N, G]
    quality: Floats  # [N]
    latent: Floats  # [N, D]
    launch_ms: Ints  # [N]
    popularity: Floats  # [N] sums to 1
    order: Ints  # [N] rank of the ad's id among all ids, as text

    @classmethod
    def draw(cls, rng: Rng, num: int) -> "Ads":
        """Prices and tags go by category, quality partly by advertiser; a fifth is launched during the log."""
        category_N = rng.integers(len(CATEGORIES), size=num)
        advertiser_N = rng.integers(max(num // 10, 1), size=num)
        log_price_K = rng.normal(2.5, 0.7, len(CATEGORIES))
        tag_share_KG = rng.beta(0.5, 2.0, (len(CATEGORIES), len(TAGS)))
        weight_N = rng.permutation(np.arange(1, num + 1) ** -0.6)
        launch_ms_N = np.where(rng.random(num) < 0.2, rng.integers(DAYS * DAY_MS, size=num), 0)
        launch_ms_N[: 4 * SLATE] = 0  # there is always a slate to show
        return cls(
            category=category_N,
            advertiser=advertiser_N,
            price=np.round(np.exp(log_price_K[category_N] + rng.normal(0, 0.5, num)), 2).astype(np.float64),
            tags=rng.random((num, len(TAGS))) < tag_share_KG[category_N],
            quality=rng.normal(0, 0.3, int(advertiser_N.max()) + 1)[advertiser_N] + rng.normal(0, 0.3, num),
            latent=rng.normal(0, LATENT**-0.25, (num, LATENT)),
            launch_ms=launch_ms_N,
            popularity=weight_N / weight_N.sum(),
            order=np.argsort(np.argsort(names("ad", num))),
        )

    def table(self) -> pl.DataFrame:
        """What an ad server knows of them."""
        tags = [[tag for tag, has in zip(TAGS, row, strict=True) if has] for row in self.tags]
        return pl.DataFrame(
            {
                "id": names("ad", len(self.price)),
                "category": np.array(CATEGORIES)[self.category],
                "advertiser": names("adv", int(self.advertiser.max()) + 1)[self.advertiser],
                "price": self.price,
                "tags": pl.Series(tags, dtype=pl.List(pl.String)),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Ordered by user, then time; no two of one user at one time."""

    user: Ints  # [R]
    ms: Ints  # [R] since the log began
    device: Ints  # [R]
    ads: Ints  # [R, S] by position
    draws: Floats  # [R, S] uniform: a click where it is below the probability

    @classmethod
    def draw(cls, rng: Rng, num_users: int, ads: Ads, num: int) -> "Requests":
        """Some people come often, most seldom; nights are quiet."""
        activity_U = rng.lognormal(0, 1.0, num_users)
        user_R = rng.choice(num_users, size=num, p=activity_U / activity_U.sum())
        waking = 1 - 0.8 * np.cos(np.arange(24) / 24 * 2 * np.pi)
        hour_R = rng.choice(24, size=num, p=waking / waking.sum())
        ms_R = rng.integers(DAYS, size=num) * DAY_MS + hour_R * HOUR_MS + rng.integers(HOUR_MS, size=num)
        order = np.lexsort((ms_R, user_R))
        user_R, ms_R = user_R[order], ms_R[order]
        while (again := np.flatnonzero((user_R[1:] == user_R[:-1]) & (ms_R[1:] <= ms_R[:-1])) + 1).size:
            ms_R[again] = ms_R[again - 1] + 1
        return cls(
            user=user_R,
            ms=ms_R,
            device=rng.choice(len(DEVICES), size=num, p=(0.6, 0.3, 0.1)),
            ads=_slates(rng, ads, ms_R),
            draws=rng.random((num, SLATE)),
        )

    def first(self, num: int) -> "Requests":
        """The first `num` requests, and what else the last one's user does."""
        end = np.searchsorted(self.user, self.user[min(num, len(self.user)) - 1], side="right")
        return Requests(**{name: values[:end] for name, values in vars(self).items()})


def names(prefix: str, num: int) -> NDArray[np.str_]:
    """`prefix0`, `prefix1`, ..."""
    return np.char.add(prefix, np.arange(num).astype(str))


def _slates(rng: Rng, ads: Ads, ms_R: Ints) -> Ints:
    """Ads drawn by popularity; one not yet launched, or in the slate already, is drawn again. Random order."""
    reach_N = np.cumsum(ads.popularity)
    slates_RS = np.full((len(ms_R), SLATE), -1)
    for slot in range(SLATE):
        again = np.arange(len(ms_R))
        while again.size:
            drawn = np.minimum(np.searchsorted(reach_N, rng.random(again.size), side="right"), len(reach_N) - 1)
            repeated = (slates_RS[again, :slot] == drawn[:, None]).any(axis=1)
            slates_RS[again, slot] = drawn
            again = again[repeated | (ads.launch_ms[drawn] > ms_R[again])]
    return rng.permuted(slates_RS, axis=1)
