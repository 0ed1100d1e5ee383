"""The rule by which the search on the development sets ends in a choice.

The log of the search has a row for each candidate and development set, with AUROC in percent. The
``kind`` is ``baseline``, ``paper`` or ``variant``, which is a score that only the study tries.
"""

import pandas as pd


def objectives(log: pd.DataFrame) -> pd.DataFrame:
    """Return each candidate's mean near and far AUROC and their mean, the objective; best first."""
    columns = [name for name in log if name not in ("encoder", "ood", "group", "auroc", "seconds")]
    wide = log.groupby([*columns, "group"], dropna=False)["auroc"].mean().unstack()
    wide = wide.assign(objective=(wide["near"] + wide["far"]) / 2).reset_index()
    wide = wide.sort_values("objective", ascending=False, ignore_index=True)
    return wide.rename_axis(columns=None)


def choose(ranked: pd.DataFrame) -> dict:
    """Return the best variant, the best baseline, and each baseline's best setting.

    ``ranked`` is what `objectives` returns. The paper's scores cannot be chosen.
    """
    baselines, variants = (ranked[ranked["kind"] == kind] for kind in ("baseline", "variant"))
    best = baselines.drop_duplicates(["features", "name"])
    settings = {
        features: dict(zip(part["name"], part["setting"], strict=True))
        for features, part in best.groupby("features")
    }
    first = best.iloc[0][["features", "name", "setting"]].to_dict()
    return {"score": variants.iloc[0]["name"], "baseline": first, "settings": settings}
