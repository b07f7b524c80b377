"""The whole path on one machine: simulate, train, export, serve, replay, compare. `make demo` runs this.

Everything it makes lies in `demo/` (made anew by each run). The service keeps answering on port 8000 after the summary;
with --once everything is stopped and the exit code is 0 when every step did what it promises.
"""

import argparse
import json
import shutil
import sys
import time

import numpy as np
import polars as pl
from local_stack import ROOT, check_port_is_free, command, online, scores
from replay import Agreement, compare, replay, table

from service.experiments.analysis import ClickRate, click_rate, lift

FOLDER = ROOT / "demo"
ARMS = ("mian", "stec")
SIMULATE = ("--users", "2000", "--items", "500", "--rows", "120000", "--seed", "7")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="stop after the summary")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()

    started = time.monotonic()
    check_port_is_free(options.port)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    data, runs = FOLDER / "prepared", {arm: FOLDER / "runs" / arm for arm in ARMS}
    _step("1/4 simulate an ad log whose true click probabilities are known")
    command("training", "simulate", "--out", FOLDER / "log", *SIMULATE)
    command("training", "prepare", "simulated", "--source", FOLDER / "log", "--out", data)
    _step("2/4 train MIAN and STEC")
    for arm, run in runs.items():
        command("training", "train", arm, "--data", data, "--out", run)
    _step("3/4 export both, fill the behaviour store, start the service")
    with online(data, runs, FOLDER, port=options.port) as server:
        _step("4/4 replay the held-out traffic through POST /predict and POST /events")
        url = f"http://127.0.0.1:{options.port}"
        answered = replay(data, url)
        agreements = compare(answered, {arm: scores(FOLDER, arm) for arm in ARMS})
        print(_summary(answered, agreements, url, time.monotonic() - started), flush=True)
        if not all(agreement.holds for agreement in agreements):
            print("The AUC over HTTP is not the offline AUC: training and serving disagree.", file=sys.stderr)
            return 1
        if not options.once:
            print(f"\nServing on {url} until you press Ctrl-C.", flush=True)
            server.wait()
    return 0


def _step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _summary(answered: pl.DataFrame, agreements: list[Agreement], url: str, seconds: float) -> str:
    lines = [f"\n== Summary ({seconds:.0f} s)", "", table(answered, agreements), ""]
    for arm in ARMS:
        test = json.loads((FOLDER / "runs" / arm / "metrics.json").read_text())["test"]
        lines.append(
            f"{arm}: on all test rows offline AUC {test['auc']:.4f} (best possible: {test['bayes_auc_blind']:.4f}),"
            f" log loss {test['calibrated']['logloss']:.4f},"
            f" predicted/observed clicks {test['calibrated']['calibration_ratio']:.3f}"
        )
    rates = {arm: _top_choice(answered, arm) for arm in ARMS}
    difference = lift(rates["stec"], rates["mian"])
    lines += [
        "",
        "A/B: each arm shows the ad it ranks first to its own half of the users, who click by the simulator's law:",
        *(
            f"  {arm}: CTR {rate.rate:.4f} ({rate.num_clicks:,} clicks, {rate.num_impressions:,} requests,"
            f" {rate.num_users:,} users)"
            for arm, rate in rates.items()
        ),
        f"  mian against stec: {difference.relative:+.1%} (95 %: {difference.low:+.1%} to {difference.high:+.1%})",
        f"  mian is the better of the two with probability {difference.probability:.2f}",
        "",
        "Where to look next:",
        f"  plots and metrics   {FOLDER.name}/runs/*/",
        f"  the artifacts       {FOLDER.name}/artifacts/",
        f"  API documentation   {url}/docs",
        f"  metrics             {url}/metrics",
    ]
    return "\n".join(lines)


def _top_choice(answered: pl.DataFrame, arm: str) -> ClickRate:
    """Clicks on what the arm ranks first, drawn from the true probabilities, by user."""
    top = answered.filter(pl.col("arm") == arm).sort("ctr", descending=True).unique("request", keep="first")
    top = top.sort("request")
    # One uniform number per request, whichever arm answers it: both arms meet the same luck.
    luck = np.random.default_rng(0).random(int(answered["request"].max()) + 1)  # type: ignore[arg-type]
    clicks = top["true_ctr_top"].to_numpy() > luck[top["request"].to_numpy()]
    users = top.with_columns(pl.Series("clicked", clicks)).group_by("user").agg(pl.len(), pl.col("clicked").sum())
    return click_rate(users["len"].to_numpy(), users["clicked"].to_numpy())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(0)
