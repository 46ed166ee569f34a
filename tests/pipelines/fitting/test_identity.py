"""What files keep of a pipeline is the same in every process."""

from pilotage.pipelines.fitting.identity import network_hash

from ...families import FAMILIES


def test_settings_that_were_not_given_may_be_listed_in_any_order():
    unet = FAMILIES["sd"].build().unet
    known, names = network_hash(unet), unet.config["_use_default_values"]
    assert len(names) > 1
    unet.register_to_config(_use_default_values=sorted(names))
    one = network_hash(unet)
    unet.register_to_config(_use_default_values=sorted(names, reverse=True))
    assert known == one == network_hash(unet)
