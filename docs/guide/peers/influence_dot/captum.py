from captum.influence import TracInCP
from torch.utils.data import TensorDataset


def load_checkpoint(module, path):
    module.load_state_dict(torch.load(path, weights_only=True))
    return 1.0


torch.save(module.state_dict(), checkpoint)
tracin = TracInCP(
    module,
    TensorDataset(torch.as_tensor(X_train), torch.as_tensor(y_train)),
    [checkpoint],
    load_checkpoint,
    loss_fn=torch.nn.CrossEntropyLoss(reduction="sum"),
    batch_size=256,
    sample_wise_grads_per_batch=True,
)
scores = tracin.influence((torch.as_tensor(X_test), torch.as_tensor(y_test)))
