"""Peers' influence methods behind one signature: (workload, damping) -> (n_test, n_train)."""

import logging
import tempfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def tensors(workload):
    train = torch.from_numpy(workload.X_train), torch.from_numpy(workload.y_train)
    return train, (torch.from_numpy(workload.X_test), torch.from_numpy(workload.y_test))


def captum_tracin(workload, damping=None):
    from captum.influence import TracInCP

    module = deepcopy(workload.modules[0])
    train, test = tensors(workload)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "checkpoint.pt")
        torch.save(module.state_dict(), path)

        def load(model, name):
            model.load_state_dict(torch.load(name))
            return 1.0

        tracin = TracInCP(
            module,
            TensorDataset(*train),
            [path],
            load,
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            batch_size=500,
            sample_wise_grads_per_batch=True,
        )
        return tracin.influence(test).detach().numpy()


def kronfluence(workload, damping=None, *, strategy="ekfac", empirical=False):
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            rows, codes = batch
            logits = model(rows)
            if sample:
                with torch.no_grad():
                    codes = torch.multinomial(logits.softmax(1), 1).flatten()
            return nn.functional.cross_entropy(logits, codes, reduction="sum")

        def compute_measurement(self, batch, model):
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    logging.disable(logging.WARNING)
    task = Classification()
    train, test = (TensorDataset(*part) for part in tensors(workload))
    model = prepare_model(deepcopy(workload.modules[0]), task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "run", model, task, cpu=True, output_dir=folder, disable_model_save=True,
            disable_tqdm=True,
        )  # fmt: skip
        analyzer.fit_all_factors(
            "factors",
            train,
            per_device_batch_size=500,
            factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=empirical),
            overwrite_output_dir=True,
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            test,
            train,
            per_device_query_batch_size=len(test),
            per_device_train_batch_size=500,
            score_args=ScoreArguments(damping_factor=damping),
            overwrite_output_dir=True,
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    logging.disable(logging.NOTSET)
    return scores.numpy()


def _pydvl(kind, workload, damping, **options):
    from pydvl.influence import torch as models

    train, test = tensors(workload)
    module = deepcopy(workload.modules[0])
    loss = nn.functional.cross_entropy
    model = getattr(models, kind)(module, loss, regularization=damping, **options)
    model = model.fit(DataLoader(TensorDataset(*train), batch_size=500))
    # its values are those of leaving rows in, with the opposite sign of a rise when left out
    return np.asarray(model.influences(*test, *train).detach())


def pydvl_nystroem(workload, damping):
    return _pydvl("NystroemSketchInfluence", workload, damping, rank=200)


def pydvl_direct(workload, damping):
    return _pydvl("DirectInfluence", workload, damping)
