from pydvl.influence import InfluenceMode, SequentialInfluenceCalculator
from pydvl.influence.torch import NystroemSketchInfluence
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

train = DataLoader(
    TensorDataset(torch.as_tensor(X_train), torch.as_tensor(y_train)), batch_size=len(X_train)
)
test = DataLoader(
    TensorDataset(torch.as_tensor(X_test), torch.as_tensor(y_test)), batch_size=len(X_test)
)
sketch = NystroemSketchInfluence(module, functional.cross_entropy, regularization=0.01, rank=100)
calculator = SequentialInfluenceCalculator(sketch.fit(train))
lazy = calculator.influences(test, train, mode=InfluenceMode.Up)
scores = torch.cat(lazy.compute()[0], 1)
