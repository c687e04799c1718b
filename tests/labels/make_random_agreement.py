"""Write random_agreement.json: agreement of random tables, by statsmodels and krippendorff.

    pip install statsmodels krippendorff && python tests/labels/make_random_agreement.py

Neither is needed to run the tests, which read the file.
"""

import json
from pathlib import Path

import krippendorff
import numpy as np
from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa, fleiss_kappa

rng, tables = np.random.default_rng(18), []
for number in range(24):
    items, raters, categories = int(rng.integers(4, 30)), int(rng.integers(2, 6)), int(rng.integers(2, 6))
    truth = rng.integers(categories, size=(items, 1))
    noisy = rng.random((items, raters)) < 0.4
    ratings = np.where(noisy, rng.integers(categories, size=(items, raters)), truth)
    found = {}
    if number % 2:
        ratings = np.where(rng.random(ratings.shape) < 0.3, -1, ratings)
    else:
        counts, _ = aggregate_raters(ratings, n_cat=categories)
        confusion = np.zeros((categories, categories))
        np.add.at(confusion, (ratings[:, 0], ratings[:, 1]), 1)
        found = {"cohen": float(cohens_kappa(confusion, return_results=False)), "fleiss": float(fleiss_kappa(counts))}
    missing = np.where(ratings < 0, np.nan, ratings).T
    for name, level in {"krippendorff": "nominal", "krippendorff_ordinal": "ordinal"}.items():
        found[name] = float(krippendorff.alpha(missing, value_domain=list(range(categories)), level_of_measurement=level))
    tables.append({"categories": categories, "ratings": ratings.tolist(), "expected": found})
lines = ",\n".join(json.dumps(table, separators=(",", ":")) for table in tables)
Path(__file__).with_name("random_agreement.json").write_text(f"[\n{lines}\n]\n")
