from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.nn import functional
from torch.utils.data import TensorDataset


class Classification(Task):
    def compute_train_loss(self, batch, model, sample=False):
        inputs, targets = batch
        logits = model(inputs)
        if sample:
            targets = torch.multinomial(logits.detach().softmax(1), 1).flatten()
        return functional.cross_entropy(logits, targets, reduction="sum")

    def compute_measurement(self, batch, model):
        inputs, targets = batch
        return functional.cross_entropy(model(inputs), targets, reduction="sum")


task = Classification()
prepared = prepare_model(module, task)  # replaces the layers of your module in place
train = TensorDataset(torch.as_tensor(X_train), torch.as_tensor(y_train))
test = TensorDataset(torch.as_tensor(X_test), torch.as_tensor(y_test))
analyzer = Analyzer("analysis", prepared, task, cpu=True, output_dir=folder)
analyzer.fit_all_factors(
    factors_name="ekfac",
    dataset=train,
    per_device_batch_size=256,
    factor_args=FactorArguments(strategy="ekfac"),
)
analyzer.compute_pairwise_scores(
    scores_name="scores",
    factors_name="ekfac",
    query_dataset=test,
    train_dataset=train,
    per_device_query_batch_size=len(test),
    score_args=ScoreArguments(damping_factor=None),
)
scores = analyzer.load_pairwise_scores("scores")["all_modules"]
