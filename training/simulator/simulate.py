"""An ad log drawn from a stated law, so that every click probability is known.

User u is shown a slate of 8 ads on a device at a time t between 0 and 1 (the log's first and last moment). Ad i, of
category c, at position s is clicked with probability

    P(click) = sigmoid(z_i - POSITION ln s)                                                          (1)
    z_i = b + q_i + of_device + of_hour                        how good the ad, how ready the person
        + A_uc + v_u . w_i                                     long-term taste
        + H_hour,c + W_c [weekend] - P_device ln(price_i)      the moment and the ad
        + sum of G_age,tag over the tags of i
        + D_c (2t - 1)                                         drift: categories come into and out of fashion
        + TASTE sum_j FADE^(j-1) [c_j = c]                     past clicks, j = 1 the newest, c_j its category
        - FATIGUE [i is among the user's last MEMORY clicks]

A_uc, latent v and w and quality q are drawn in `simulator.population`, the other effects here. The past is what
`models.features.history` says: clicks strictly earlier, by time and item id. Slots are filled in random order, so a
position says nothing about its ad: a model that is not shown positions is not misled by them, only less sharp. The
intercept b gives the click rate. A fifth of the ads are launched during the log, and many of these are new to a model
trained on its beginning.

Written to the folder, in time order, one row per impression:
  impressions.parquet   request, user, ts (Unix seconds, exact in ms), ad, position, device, click, and the truth:
                        true_ctr (1), true_ctr_top (1 at position 1), true_ctr_blind (mean of 1 over the positions, the
                        best that a model without position can know)
  users.parquet         id, gender, age, country, interest (where declared)
  ads.parquet           id, category, advertiser, price, tags
  simulation.json       what was asked for, and what the best possible model has on the whole log
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.special import expit

from training.errors import UserError
from training.log import write_parquet
from training.progress import Advance, bar
from training.simulator.bayes_optimal import expected_auc, expected_logloss
from training.simulator.population import (
    AGES,
    CATEGORIES,
    DAY_MS,
    DAYS,
    DEVICES,
    HOUR_MS,
    SLATE,
    TAGS,
    Ads,
    Bools,
    Floats,
    Ints,
    Requests,
    Rng,
    Users,
    names,
)

START = 1_767_571_200  # Monday 2026-01-05 00:00 UTC
CLICK_RATE = 0.10
POSITION = 0.35
TASTE, FADE = 0.9, 0.75
FATIGUE, MEMORY = 1.2, 5
FILES = ("impressions.parquet", "users.parquet", "ads.parquet", "simulation.json")  # in the order they are written


def simulate(out: Path, users: int, items: int, rows: int, seed: int) -> dict[str, Any]:
    """Write an ad log of `rows` impressions (rounded up to whole slates) to the folder; returns simulation.json.

    The same arguments give the same log. Raises UserError.
    """
    for name, value, least in (("--users", users, 1), ("--items", items, 4 * SLATE), ("--rows", rows, SLATE)):
        if value < least:
            raise UserError(f"{name}: expected a whole number of at least {least}, got {value}")
    if seed < 0:
        raise UserError(f"--seed: expected a whole number of at least 0, got {seed}")
    who, what, when, how = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4))
    people, ads = Users.draw(who, users), Ads.draw(what, items)
    requests = Requests.draw(when, users, ads, -(-rows // SLATE))
    base_RS = _base(how, people, ads, requests)
    intercept = _intercept(base_RS, ads, requests)
    with bar("simulating", requests.ads.size) as advance:
        logit_RS, clicks_RS = _play(base_RS + intercept, ads, requests, advance)

    impressions = _table(requests, logit_RS, clicks_RS)
    about = {"users": users, "items": items, "rows": impressions.height, "seed": seed, "intercept": intercept}
    about |= {"click_rate": float(clicks_RS.mean())} | _best(impressions)
    _clear(out)
    write_parquet(impressions, out / "impressions.parquet")
    write_parquet(people.table(), out / "users.parquet")
    write_parquet(ads.table(), out / "ads.parquet")
    (out / FILES[-1]).write_text(json.dumps(about, indent=2))
    print(
        f"wrote {out}: {impressions.height:,} impressions, click rate {about['click_rate']:.4f},"
        f" Bayes-optimal AUC {about['auc']:.4f} ({about['auc_blind']:.4f} without position)",
        file=sys.stderr,
    )
    return about


def _base(rng: Rng, users: Users, ads: Ads, requests: Requests) -> Floats:
    """All of z but the intercept and the two terms of the past."""
    num = len(CATEGORIES)
    user_R1, ads_RS = requests.user[:, None], requests.ads
    hour_R1, day_R = requests.ms[:, None] // HOUR_MS % 24, requests.ms // DAY_MS
    weekend_R1, t_R1 = day_R[:, None] % 7 >= 5, requests.ms[:, None] / (DAYS * DAY_MS)
    category_RS = ads.category[ads_RS]
    of_device, of_price = np.array([0.0, 0.25, -0.15]), np.array([0.35, 0.0, 0.15])  # as DEVICES
    of_hour = 0.25 * np.cos((np.arange(24) - 20) / 24 * 2 * np.pi)  # evenings click more
    peak_K, height_K = rng.integers(24, size=num), np.abs(rng.normal(0, 0.4, num))
    hour_category = height_K * np.cos((np.arange(24)[:, None] - peak_K) / 24 * 2 * np.pi)
    weekend_K, drift_K = rng.normal(0, 0.3, num), rng.normal(0, 0.3, num)
    tags_by_age = ads.tags @ rng.normal(0, 0.25, (len(TAGS), len(AGES)))

    base_RS: Floats = (
        ads.quality[ads_RS]
        + of_device[requests.device][:, None]
        + of_hour[hour_R1]
        + users.affinity[user_R1, category_RS]
        + np.einsum("rd,rsd->rs", users.latent[requests.user], ads.latent[ads_RS])
        + hour_category[hour_R1, category_RS]
        + weekend_K[category_RS] * weekend_R1
        - of_price[requests.device][:, None] * np.log(ads.price[ads_RS])
        + tags_by_age[ads_RS, users.age[user_R1]]
        + drift_K[category_RS] * (2 * t_R1 - 1)
    )
    return base_RS


def _play(base_RS: Floats, ads: Ads, requests: Requests, advance: Advance | None = None) -> tuple[Floats, Bools]:
    """Everybody lives through their requests: z, and the clicks. All make their n-th at once: users are independent."""
    num_users = int(requests.user.max()) + 1
    taste_UK = np.zeros((num_users, len(CATEGORIES)))
    recent_UM = np.full((num_users, MEMORY), -1)
    logit_RS, clicks_RS = base_RS.copy(), np.zeros(base_RS.shape, dtype=np.bool_)
    by_id_RS = np.argsort(ads.order[requests.ads], axis=1)
    for now in _rounds(requests.user):
        user, shown = requests.user[now], requests.ads[now]
        tired = (recent_UM[user][:, :, None] == shown[:, None, :]).any(axis=1)
        logit_RS[now] += TASTE * taste_UK[user[:, None], ads.category[shown]] - FATIGUE * tired
        clicked = clicks_RS[now] = requests.draws[now] < expit(logit_RS[now] - _of_position())
        for slot in by_id_RS[now].T:  # the clicks of one slate are remembered in the order of their item ids
            rows = np.flatnonzero(clicked[np.arange(len(now)), slot])
            who, ad = user[rows], shown[rows, slot[rows]]
            taste_UK[who] *= FADE
            taste_UK[who, ads.category[ad]] += 1
            recent_UM[who] = np.column_stack([ad, recent_UM[who, :-1]])
        if advance is not None:
            advance(shown.size)
    return logit_RS, clicks_RS


def _rounds(user_R: Ints) -> Iterator[Ints]:
    """Everybody's first request, then everybody's second, ... of requests ordered by user."""
    turn_R = np.arange(len(user_R)) - np.searchsorted(user_R, user_R)
    order = np.argsort(turn_R, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(turn_R[order])) + 1)


def _intercept(base_RS: Floats, ads: Ads, requests: Requests) -> float:
    """The b that gives CLICK_RATE, by bisection on some users: the past makes clicks breed clicks, so it is played."""
    sample = requests.first(20_000)
    low, high = -10.0, 10.0
    for _ in range(14):
        middle = (low + high) / 2
        logit_RS, _ = _play(base_RS[: len(sample.user)] + middle, ads, sample)
        rate = expit(logit_RS - _of_position()).mean()
        low, high = (middle, high) if rate < CLICK_RATE else (low, middle)
    return (low + high) / 2


def _table(requests: Requests, logit_RS: Floats, clicks_RS: Bools) -> pl.DataFrame:
    order = np.argsort(requests.ms, kind="stable")
    num = len(order)
    truth_RSP = expit(logit_RS[order][:, :, None] - _of_position())  # P: had it stood at that position
    user_R, ms_R, device_R = (v[order] for v in (requests.user, requests.ms, requests.device))
    ads = requests.ads[order].ravel()
    return pl.DataFrame(
        {
            "request": np.repeat(names("r", num), SLATE),
            "user": np.repeat(names("u", int(user_R.max()) + 1)[user_R], SLATE),
            "ts": np.repeat(START + ms_R / 1000, SLATE),
            "ad": names("ad", int(ads.max()) + 1)[ads],
            "position": np.tile(np.arange(1, SLATE + 1), num),
            "device": np.repeat(np.array(DEVICES)[device_R], SLATE),
            "click": clicks_RS[order].ravel().astype(np.int8),
            "true_ctr": np.diagonal(truth_RSP, axis1=1, axis2=2).ravel(),
            "true_ctr_top": truth_RSP[:, :, 0].ravel(),
            "true_ctr_blind": truth_RSP.mean(axis=2).ravel(),
        }
    )


def _best(impressions: pl.DataFrame) -> dict[str, float]:
    """What no model exceeds on average over the clicks: one that knows the position, and one that does not."""
    truth, blind = impressions["true_ctr"].to_numpy(), impressions["true_ctr_blind"].to_numpy()
    return {
        "auc": expected_auc(truth, truth),
        "auc_blind": expected_auc(blind, truth),
        "logloss": expected_logloss(truth, truth),
        "logloss_blind": expected_logloss(blind, truth),
    }


def _clear(out: Path) -> None:
    """Makes the folder, or takes simulation.json from an earlier log's: what has none is not whole."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        other = sorted({file.name for file in out.iterdir()} - set(FILES))
        if other:
            raise UserError(f"--out {out}: expected a new or an empty folder or an earlier log, found {other[0]} there")
        (out / FILES[-1]).unlink(missing_ok=True)
    except OSError as err:
        raise UserError(f"--out {out}: expected a folder that can be made ({err.strerror})") from err


def _of_position() -> Floats:
    return POSITION * np.log(np.arange(1, SLATE + 1))
