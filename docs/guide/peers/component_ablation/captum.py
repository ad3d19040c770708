from captum.attr import LayerFeatureAblation


def margin(inputs, targets):
    logits = module(inputs)
    label = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], -torch.inf)
    return (label - others.amax(1, keepdim=True))[:, 0]


columns = []
for layer in module.modules():
    if isinstance(layer, torch.nn.Conv2d):
        shape = (1, layer.out_channels, 1, 1)
        groups = torch.arange(layer.out_channels).reshape(shape)
        ablation = LayerFeatureAblation(margin, layer)
        effect = ablation.attribute(
            torch.as_tensor(X_test),
            additional_forward_args=torch.as_tensor(y_test),
            layer_mask=groups,
        )
        columns.append(effect.flatten(2)[:, :, 0].detach())
scores = torch.cat(columns, 1)
