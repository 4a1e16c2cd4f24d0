"""_method.py: what each shipped record says is what its method does."""

import dataclasses

import pytest
import torch
from helpers import loud, statistics_alone, with_statistics
from tiny_runs import DISTILLED, GENERATORS, module_of, own, run, small

import fedmitr as fm
from fedmitr.core.store import Store
from fedmitr.methods import FAMILIES, METHODS, SHIPPED, Range, Work, check_methods
from fedmitr.server.ensemble import Ensemble
from fedmitr.settings import Settings, defaults
from fedmitr.upload import ModelShape
from fedmitr.vision.vit import create_vit

UNCOUNTED = {"ensemble.mode": "mean_probs", "inversion.teacher": "ensemble"}  # neither needs histograms
LIKE_PLUS = {"calibrated_ensemble", "ensemble_statistics", "textures", "real_images"}  # its teacher or images
UNTUNED = {"fedavg", "local", "central"} | LIKE_PLUS
COUNT = {"fedftg", "fedmitr_plus"} | LIKE_PLUS  # methods that need histograms anyhow


@pytest.fixture(scope="module")
def outcomes(clients, tmp_path_factory):
    """Every shipped method on the same clients, with everyone's budget and with its own."""
    budgets = {name: value for m in GENERATORS for name, value in own(m, images=5, student_steps=4).items()}
    settings = [small(), small(budgets | {"budget": "own"})]
    store = Store(tmp_path_factory.mktemp("outcomes"))
    return {(name, s.budget): (s, run(name, clients, s, store)) for name in SHIPPED for s in settings}


@pytest.mark.parametrize("budget", ["equal", "own"])
@pytest.mark.parametrize("method", SHIPPED)
def test_the_record_says_what_a_run_computes_and_leaves(method, budget, outcomes, clients):
    record, (settings, outcome) = METHODS[method], outcomes[method, budget]
    assert record.sends or outcome.uplink_bytes is None  # a run then counts none
    work = record.work_under(settings)
    assert work.images == (len(outcome.synthetic) if outcome.synthetic else 0)
    assert work.student_steps == outcome.student_steps
    if not record.is_reference:  # some references make images, or learn on others
        assert record.distils == (work.images > 0) == (work.student_steps > 0)
    if budget == "own" and method in GENERATORS:
        assert (work.images, work.student_steps) == (5, 4)


@pytest.mark.parametrize("method", SHIPPED)
def test_a_prediction_runs_one_model_or_all_clients(method, outcomes, clients, block_passes):
    models = outcomes[method, "equal"][1].models
    for model in models:
        model(torch.zeros(1, 1, 12, 12))
    passes = len(block_passes) / len(models) / len(clients[0].vit().blocks)
    more = method == "ensemble_statistics"  # the shared model beside the clients'
    assert passes == (1 if METHODS[method].single_model else len(clients) + more)
    assert len(models) == (len(clients) if method == "local" else 1)


@pytest.mark.parametrize("method", SHIPPED)
def test_methods_that_need_class_histograms_refuse_uploads_without_and_no_others_do(
    method, clients, tmp_path, one_line
):
    settings = small(UNCOUNTED)
    assert METHODS[method].needs_counts_under(settings) == (method in COUNT)
    if method in COUNT:
        with pytest.raises(fm.BadInput) as error:
            run(method, clients, settings, Store(tmp_path), counted=False)
        one_line(error.value, "class_counts", "client 0")
    else:
        run(method, clients, settings, Store(tmp_path), counted=False)


@pytest.mark.parametrize("method", SHIPPED)
@pytest.mark.parametrize("change", [{"ensemble.mode": "class"}, {"inversion.teacher": "owners"}])
def test_where_the_settings_need_class_histograms_whoever_sends_weights_sends_them(method, change):
    assert METHODS[method].needs_counts_under(small(change)) == METHODS[method].needs_weights


@pytest.mark.parametrize("method", SHIPPED)
@pytest.mark.parametrize("lacking", ["weights", "statistics"])
def test_methods_refuse_uploads_without_what_they_need(method, lacking, clients, tmp_path, one_line):
    record, settings = METHODS[method], small()
    if not {"weights": record.needs_weights, "statistics": record.needs_statistics_under(settings)}[lacking]:
        return
    if record.given in ("clients", "stages"):
        return  # their clients have no message yet: test_exchanges.py, tests/client/test_fusefl.py
    informed = [with_statistics(u, "both") for u in clients]
    spoil = {"weights": statistics_alone, "statistics": lambda u: u.without_statistics()}[lacking]
    one, two = informed[0], informed[1]
    more = [torch.zeros(4, 1, 12, 12)] if record.given == "images" else []
    for some in ([spoil(one)], *([[one, spoil(two)]] * (record.given != "central"))):
        with pytest.raises(fm.BadInput) as error:
            record(some, settings, Store(tmp_path), *more)
        one_line(error.value, f"client {some[-1].client}", f"has no {lacking}")


@pytest.mark.parametrize("method", SHIPPED)
def test_statistics_that_a_method_does_not_need_change_nothing(method, clients, outcomes, tmp_path):
    record, settings = METHODS[method], small()
    if record.needs_statistics_under(settings) or record.given != "uploads":
        return
    outcome = record([with_statistics(u, "both") for u in clients], settings, Store(tmp_path))
    for one, other in zip(outcome.models, outcomes[method, "equal"][1].models, strict=True):
        assert all(torch.equal(v, other.state_dict()[n]) for n, v in one.state_dict().items())


@pytest.fixture(scope="module")
def mixed(clients):
    """The three clients, one of them with a deeper model."""
    vit = loud(create_vit("vit_micro_deep", 10, image_size=12), seed=1)
    deep = dataclasses.replace(
        clients[1], shape=ModelShape.of("vit_micro_deep", vit), weights=dict(vit.state_dict())
    )
    return [clients[0], deep, clients[2]]


@pytest.mark.parametrize("method", SHIPPED)
def test_methods_that_average_refuse_several_architectures_and_no_others_do(
    method, mixed, tmp_path, one_line
):
    start = {"distill.start": "initial", "model.pretrained": False}
    if METHODS[method].averages:
        with pytest.raises(fm.BadInput) as error:
            run(method, mixed, small(start), Store(tmp_path))
        one_line(error.value, "client 1")
    else:
        run(method, mixed, small(start), Store(tmp_path))


@pytest.mark.parametrize("method", SHIPPED)
def test_several_architectures_are_refused_before_a_run_as_they_are_in_it(method, one_line):
    models = {"client.models": ("vit_micro", "vit_micro_deep")}
    averages, distils = METHODS[method].averages, METHODS[method].work_under(small()).student_steps > 0
    for start in ("average", "initial"):
        settings = small(models | {"distill.start": start})
        if averages or (distils and start == "average"):
            with pytest.raises(fm.BadInput) as error:
                check_methods([method], settings)
            one_line(error.value, "vit_micro_deep", "one architecture")
        else:
            check_methods([method], settings)


# Settings and the values that tuning may try.


@pytest.mark.parametrize("method", SHIPPED)
def test_every_value_that_tuning_may_try_is_allowed(method):
    search = METHODS[method].search
    assert bool(search) == (method not in UNTUNED)
    for name, values in search.items():
        if isinstance(values, Range):
            assert values.low < values.high and (values.low > 0 or not values.log)
            values = (values.low, values.high)
        assert len(set(values)) == len(values) > 1
        for value in values:
            changed = Settings.load("smoke", {name: value})
            block, leaf = name.split(".")
            assert getattr(getattr(changed, block), leaf) == value


@pytest.mark.parametrize("method", SHIPPED)
def test_tuning_tries_settings_of_the_methods_own_block_and_of_what_it_shares(method):
    blocks = {name.split(".")[0] for name in METHODS[method].search}
    method = {"ridge_plus": "fedmitr_plus"}.get(method, method)  # whose sums it takes
    assert blocks <= {method, "ensemble", "inversion", "relabel", "distill", "statistics"}


@pytest.mark.parametrize("method", SHIPPED)
def test_a_methods_block_is_part_of_every_run(method):
    block = METHODS[method].settings
    if block:
        assert type(getattr(Settings(), method)) is block
        assert {f"{method}.{name}" for name in block.model_fields} <= set(defaults())


@pytest.mark.parametrize("method", SHIPPED)
def test_a_record_is_complete(method):
    record = METHODS[method]
    assert record.name == method and record.run is getattr(module_of(method), method)
    assert record.label and record.family in FAMILIES
    assert bool(record.citation) != record.is_reference
    assert list(METHODS)[: len(SHIPPED)] == list(SHIPPED)


# The server's work, which `--dry-run` counts.


@pytest.mark.parametrize("method", GENERATORS)
@pytest.mark.parametrize("images", [1, 8])
def test_the_work_of_a_generator_is_the_batches_that_train_it(method, images, clients, tmp_path, monkeypatch):
    """With one image there is one round, whatever the setting."""
    batches, logits = [], Ensemble.logits

    def count(self, x, keep=None):
        if x.requires_grad and torch.is_grad_enabled():
            batches.append(len(x))
        return logits(self, x, keep)

    if method == "fdafl":  # it runs the members itself, for their features
        module, excite = module_of(method), module_of(method).excite
        monkeypatch.setattr(module, "excite", lambda e, x: batches.append(len(x)) or excite(e, x))
    if method == "fedftg":  # it takes one client after the other
        module, ask = module_of(method), module_of(method).client_logits
        monkeypatch.setattr(module, "client_logits", lambda e, k, x: batches.append(len(x)) or ask(e, k, x))
    monkeypatch.setattr(Ensemble, "logits", count)
    settings = small(own("co_boosting", perturbation=0) | {"partition.clients": 2}, images=images)
    METHODS[method](clients[:2], settings, Store(tmp_path))
    work = METHODS[method].work_under(settings)
    assert batches == [work.generator_batch] * work.generator_steps


@pytest.mark.parametrize("method", DISTILLED)
def test_the_work_of_calibration_is_that_of_the_methods_block(method):
    assert METHODS[method].work_under(small(own(method, calibrate=0.3))).calibrate == 0.3


def test_fadi_inverts_without_stops_and_fedmitr_with_the_runs(outcomes):
    run = small({"inversion.stop_at": (1,), "inversion.stop_ratio": (0.5,)})
    dense, sparse = METHODS["fadi"].work_under(run), METHODS["fedmitr"].work_under(run)
    assert (dense.inversion.stop_at, dense.inversion.iterations) == ((), run.fadi.iterations)
    assert sparse.inversion == run.inversion and not sparse.student_inverted and dense.student_inverted
    alone = METHODS["fadi"].work_under(run.changed({"fadi.competition": 0}))
    assert not alone.student_inverted


def test_by_default_the_work_is_everybodys_budget_where_a_student_is_distilled():
    bare = {family: dataclasses.replace(METHODS["dense"], work=None, family=family) for family in FAMILIES}
    found = {family: record.work_under(small(images=7, steps=2)) for family, record in bare.items()}
    assert found.pop("synthetic images") == Work(images=7, student_steps=2)
    assert set(found.values()) == {Work()}


@pytest.mark.parametrize("method", SHIPPED)
def test_tuning_may_try_each_default(method):
    record, settings = METHODS[method], Settings.load("laptop")
    settings = record.adapted(settings)
    for name, values in record.search.items():
        value = settings.model_dump()
        for part in name.split("."):
            value = value[part]
        held = values.low <= value <= values.high if isinstance(values, Range) else value in list(values)
        assert held, f"{name}={value!r} is not in {values}"
