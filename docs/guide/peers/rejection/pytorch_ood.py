from pytorch_ood.detector import EnergyBased
from pytorch_ood.metrics import OODMetrics

detector = EnergyBased(module)
metrics = OODMetrics()
metrics.update(detector(torch.as_tensor(X_test)), torch.as_tensor(y_test))
metrics.update(detector(torch.as_tensor(X_other)), -torch.ones(len(X_other)))
figures = metrics.compute()
