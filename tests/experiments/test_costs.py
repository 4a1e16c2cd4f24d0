"""run.py, the account of a run: seconds, images, steps, bytes, operations, against files and by hand."""

import json

import pytest
import torch
from helpers import GENERATORS, small_settings
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fedmitr as fm
from fedmitr.evaluation.flops import forward_flops
from fedmitr.evaluation.plan import plan
from fedmitr.methods import METHODS

FEDMITRS = ("fedmitr", "fedmitr_plus")
DISTILLED = (*FEDMITRS, "fadi", *GENERATORS)
STATISTICS = ("ncm", "ridge", "ridge_plus", "lda", "fishermix")  # sent alone
TWICE = ("fedavg_ridge", "stacking")
INFORMED = ("fedmitr_plus", "ensemble_statistics", "textures", "real_images")  # weights and statistics
COUNTED = ("fedftg", "calibrated_ensemble", *INFORMED)
REGIONS = ("ridge_plus", *INFORMED)  # their sums are of regions and views; other methods' of both tokens
CENTRAL = ("central", "central_ridge")
SUMS = 8 * (10 + 10 * 192 + 192 * 193 // 2)  # counts, sums and half a Gram matrix of both tokens, float64
SUMS_PLUS = 8 * (10 + 10 * 960 + 960 * 961 // 2)  # of CLS and four regions after each of two blocks

STAGES = {method: {"inversion", "distillation"} for method in (*FEDMITRS, "fadi")}
STAGES |= {method: {"generation", "distillation"} for method in GENERATORS}
STAGES |= {method: {"solving"} for method in (*STATISTICS, *TWICE, "central_ridge", "ensemble_statistics")}
STAGES |= {"fusefl": {"fusing"}, "calibrated_ensemble": {"inversion", "calibration"}}
STAGES |= {method: {"distillation"} for method in ("textures", "real_images")}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reports_an_accuracy_and_a_whole_account(results, method):
    result = results[method]
    assert result.method == method and 0 <= result.accuracy <= 1 and len(result.accuracy_per_class) == 10
    assert all(0 <= share <= 1 for share in result.accuracy_per_class)
    clients = {"central"} if method in CENTRAL else {"clients"}
    assert set(result.seconds) == clients | STAGES.get(method, set())
    assert all(value >= 0 for value in result.seconds.values())


def test_references_are_reported_where_clients_train(results):
    for method, result in results.items():
        found = [result.ensemble_accuracy, result.fedavg_accuracy, result.best_local_accuracy]
        if method in (*STATISTICS, "central_ridge"):
            assert found == [None] * 3 and result.local_accuracies == []
        else:
            assert found == [results[name].accuracy for name in ("ensemble", "fedavg")] + [
                max(result.local_accuracies)
            ]
            assert len(result.local_accuracies) == 2


def features_of(these, method):
    """What a method's sums are of."""
    return these.features_of(METHODS[method].adapted(these.settings))


def test_seconds_of_clients_are_those_of_all_that_they_compute(results, these, store):
    """As measured when it was made: training, the sums of their features, or both."""

    def spent(stage, keys):
        return sum(json.loads((store / stage / key / "seconds.json").read_text()) for key in keys)

    trained = spent("uploads", [these.upload_key(k) for k in range(2)])
    features = {method: features_of(these, method) for method in (*STATISTICS, *INFORMED)}
    summed = {
        m: spent("statistics", [these.statistics_key(k, f) for k in range(2)]) for m, f in features.items()
    }
    for method in STATISTICS:
        assert results[method].seconds["clients"] == pytest.approx(summed[method], abs=1e-3)
    for method in INFORMED:
        assert results[method].seconds["clients"] == pytest.approx(trained + summed[method], abs=1e-3)
    for method in ("fedavg", "fedmitr", "calibrated_ensemble"):
        assert results[method].seconds["clients"] == pytest.approx(trained, abs=1e-3)
    for method in TWICE:  # and the second exchange's sums
        assert results[method].seconds["clients"] > trained


def test_under_an_equal_budget_all_that_distil_make_as_many_images_and_steps(results):
    for method, result in results.items():
        wanted = (20, 6) if method in (*DISTILLED, "textures", "real_images") else (0, 0)
        wanted = (20, 0) if method == "calibrated_ensemble" else wanted
        assert (result.synthetic_images, result.student_steps) == wanted, method


def test_under_its_own_budget_a_method_has_the_numbers_of_its_block(store):
    own = {f"{method}__images": 4 + i for i, method in enumerate(GENERATORS)}
    own |= {f"{method}__student_steps": 3 + i for i, method in enumerate(GENERATORS)}
    own = fm.Experiment(small_settings(budget="own", **own), store)
    for i, method in enumerate(GENERATORS):
        outcome = own.outcome(method)
        assert (len(outcome.synthetic), outcome.student_steps) == (4 + i, 3 + i), method
    for method in (*FEDMITRS, "fadi"):
        outcome = own.outcome(method)
        assert (len(outcome.synthetic), outcome.student_steps) == (20, 6), method


def size_of(arrays, folder):
    save_file(arrays, folder / "arrays.safetensors")
    return (folder / "arrays.safetensors").stat().st_size


def test_bytes_up_are_those_of_the_files_that_clients_send(results, these, tmp_path):
    """FuseFL's several messages: tests/client/test_fusefl.py."""
    trained = [these.store.root / "uploads" / these.upload_key(k) for k in range(2)]
    weights = sum((folder / "weights.safetensors").stat().st_size for folder in trained)
    shape = {"name": "vit_micro", "num_classes": 10, "image_size": 12, "in_chans": 1}
    plain = {"shape": shape, "weights": "vit_micro, pretrained=False", "tokens": "both"}
    regions = plain | {"tokens": "regions", "views": 8}
    lengths = {}
    for method, values in {"ridge": SUMS, "ridge_plus": SUMS_PLUS}.items():
        lengths[method] = size_of(these.statistics_of(features_of(these, method))[0].to_arrays(), tmp_path)
        assert values < lengths[method] < values + 400

    def cards(**sent):
        """Bytes of both clients' cards, which JSON text without spaces is."""
        found = 0
        for upload in these.counted_uploads:
            card = {"client": upload.client, "size": upload.size, "shape": shape}
            card |= {"class_counts": upload.class_counts if sent.get("counted") else None}
            card |= {"weights": False} if "alone" in sent else {}  # that they are sent is not said
            card |= {"features": sent["features"]} if "features" in sent else {}
            found += len(json.dumps(card, separators=(",", ":")))
        return found

    wide = {"fedavg_ridge": 192, "stacking": 2 * 192}
    for method, result in results.items():
        source, sums = (plain, lengths["ridge"])
        if method in REGIONS:
            source, sums = (regions, lengths["ridge_plus"])
        if method in ("local", *CENTRAL):
            wanted = 0
        elif method in STATISTICS:
            wanted = 2 * sums + cards(alone=True, features=source)
        elif method in INFORMED:
            wanted = weights + 2 * sums + cards(counted=True, features=source)
        elif method == "fusefl":
            continue
        else:
            wanted = weights + cards(counted=method in COUNTED)
        if method in TWICE:
            width = wide[method]
            second = {"counts": torch.zeros(10, dtype=torch.int64), "sums": torch.zeros(10, width).double()}
            second["gram"] = torch.zeros(width * (width + 1) // 2).double()
            wanted += 2 * size_of(second, tmp_path)
        assert result.upload_bytes == wanted, method


def test_bytes_down_are_the_shared_model_and_what_is_sent_back(results, these, tmp_path):
    model = size_of(these.initial.state_dict(), tmp_path)
    for method, result in results.items():
        if method != "fusefl":
            back = {"fedavg_ridge": 1, "stacking": 2}.get(method, 0)  # the average, or both models
            wanted = 0 if method in CENTRAL else 2 * model * (1 + back)
            assert result.download_bytes == wanted, method


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_foretells_the_bytes_of_the_run(method, results):
    """But for the headers of its files and the cards; of floats, weights have 4 bytes and sums 8."""
    result = results[method]
    told = sum(stage.bytes for stage in plan(method, small_settings()))
    sends = method not in ("local", *CENTRAL)
    found = result.upload_bytes + result.download_bytes if sends else 0
    assert told == pytest.approx(found, rel=0.01)


def test_exchanges_are_one_but_for_those_of_several_and_what_is_not_federated(results):
    found = {method: result.exchanges for method, result in results.items()}
    several = dict.fromkeys(("fusefl", *TWICE), 2) | dict.fromkeys(("local", *CENTRAL), 0)
    assert found == dict.fromkeys(METHODS, 1) | several


def test_inference_costs_one_model_or_all_of_them(results, these):
    one = forward_flops(these.initial, 9) + 2 * 96 * 10  # and the head
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        these.initial.eval().forward_features(torch.zeros(1, 1, 12, 12))
    features = counter.get_total_flops()  # of both tokens, for which the last block computes all
    assert features > one
    wanted = dict.fromkeys((*STATISTICS, "central_ridge", "fedavg_ridge"), features + 2 * 192 * 10)
    wanted |= dict.fromkeys(("ensemble", "calibrated_ensemble", "fusefl"), 2 * one)
    wanted |= {"stacking": 2 * features + 2 * 384 * 10}
    plus = features + 2 * (2 * 4 * 9 * 96) + 2 * 960 * 10  # two blocks' means of 9 patches in 4 regions
    wanted |= dict.fromkeys(("ridge_plus", "fedmitr_plus", "textures", "real_images"), plus)
    wanted |= {"ensemble_statistics": 2 * one + plus}
    for method, result in results.items():
        assert result.inference_flops == wanted.get(method, one), method
