"""Scores of latents against labels, each against a loop."""

import json
import math

import pytest
import torch

from hf_hierarchical_sae import LatentActivations, score_labels


def recorded(dense: torch.Tensor, k: int, context_length: int = 5) -> LatentActivations:
    """Activations of (tokens, d_sae) by hand: the k largest of each token, zeros left out."""
    tokens, d_sae = dense.shape
    values, indices = dense.topk(k, dim=1)
    fires = values > 0
    positions = torch.arange(tokens).unsqueeze(1).expand_as(indices)[fires]
    ranks = torch.arange(1, k + 1).expand_as(indices)[fires]
    latents, order = indices[fires].sort(stable=True)
    starts = torch.tensor([0, *torch.bincount(latents, minlength=d_sae).cumsum(0).tolist()])
    return LatentActivations(
        k=k,
        token_ids=torch.arange(tokens) % 250 + 3,
        context_starts=torch.tensor([*range(0, tokens, context_length), tokens]),
        is_read=torch.ones(tokens, dtype=torch.bool),
        latent_starts=starts,
        positions=positions[order].int(),
        values=values[fires][order],
        ranks=ranks[order].short(),
    )


def random_activations(tokens=300, d_sae=12, k=6, **options):
    # Rounded, so that equal activations occur.
    return recorded((torch.randn(tokens, d_sae).relu() * 4).round() / 4, k, **options)


def score(activations, labels, names="abc", **options):
    return score_labels(activations, labels, list(names), show_progress=False, **{"min_fires": 1, **options})


def pairwise_auroc(values, is_positive):
    positive, negative = values[is_positive].unsqueeze(1), values[~is_positive]
    return ((positive > negative).double() + 0.5 * (positive == negative).double()).mean().item()


def test_every_score_is_what_a_loop_over_tokens_gives():
    activations, labels = random_activations(), torch.randint(-1, 3, (300,))
    activations.is_read[::7] = False
    found = score(activations, labels, budgets=[2, 6])
    used = activations.is_read & (labels >= 0)

    assert found.tokens == used.sum()
    for place, budget in enumerate((2, 6)):
        for latent in range(12):
            dense = torch.zeros(300)
            positions, values, ranks = activations.latent(latent)
            dense[positions[ranks <= budget].long()] = values[ranks <= budget]
            dense, of_token = dense[used], labels[used]
            shares = [(of_token[dense > 0] == label).double().mean().item() for label in range(3)]
            fires = (dense > 0).double().mean().item()
            mutual = 0.0
            for label in range(3):
                for sign in (True, False):
                    both = ((of_token == label) & ((dense > 0) == sign)).double().mean().item()
                    alone = (of_token == label).double().mean().item() * (fires if sign else 1 - fires)
                    mutual += both * math.log(both / alone) if both else 0.0
            entropy = -fires * math.log(fires) - (1 - fires) * math.log(1 - fires)
            aurocs = [pairwise_auroc(dense, of_token == label) for label in range(3)]
            assert found.purity[place, latent] == pytest.approx(max(shares))
            assert shares[found.best_label[place, latent]] == max(shares)
            assert found.information[place, latent] == pytest.approx(mutual / entropy)
            assert found.auroc[place, latent] == pytest.approx(max(aurocs))


def test_the_probe_is_chosen_on_one_half_and_measured_on_the_other():
    activations, labels = random_activations(context_length=4), torch.randint(0, 3, (300,))
    found = score(activations, labels, budgets=[6])
    dense = torch.zeros(300, 12)
    for latent in range(12):
        positions, values, _ = activations.latent(latent)
        dense[positions.long(), latent] = values

    half = activations.position_contexts % 2
    for label in range(3):
        choosing, measuring = (
            [pairwise_auroc(dense[half == h, latent], labels[half == h] == label) for latent in range(12)]
            for h in (0, 1)
        )
        assert found.probe_auroc[0, label] == pytest.approx(measuring[choosing.index(max(choosing))])


@pytest.mark.parametrize("half", [0, 1])
def test_no_probe_is_chosen_for_a_label_that_one_half_lacks_or_has_alone(half):
    activations = random_activations(context_length=4)
    in_half = activations.position_contexts % 2 == half
    missing = torch.where(in_half, torch.randint(0, 2, (300,)), torch.randint(0, 3, (300,)))
    alone = torch.where(in_half, 2, torch.randint(0, 3, (300,)))

    assert score(activations, missing, budgets=[6]).probe_auroc[0].isnan().tolist() == [False, False, True]
    assert score(activations, alone, budgets=[6]).probe_auroc[0].isnan().tolist() == [True, True, True]


def test_a_latent_for_each_label_scores_perfectly_and_noise_scores_as_by_chance():
    labels = torch.randint(0, 3, (600,))
    dense = torch.rand(600, 6) * (torch.rand(600, 6) < 0.2)
    dense[:, :3] = torch.nn.functional.one_hot(labels, 3) * (1 + torch.rand(600, 3))

    found = score(recorded(dense, 6), labels, budgets=[1, 6])

    for place in (0, 1):
        assert found.purity[place, :3].tolist() == [1, 1, 1] and found.best_label[place, :3].tolist() == [0, 1, 2]
        assert found.auroc[place, :3].tolist() == [1, 1, 1] and found.probe_auroc[place].tolist() == [1, 1, 1]
        assert found.above_chance[place, :3].all()
    # Three of equal frequency: the label explains all of a latent that fires on one of them.
    assert found.information[1, :3].tolist() == pytest.approx([1, 1, 1])
    noise = found.information[1, 3:] - found.information_by_chance[1, 3:]
    assert noise.abs().max() < 0.02 and found.purity_by_chance[1, :3].max() < 0.45
    # At one latent per token the noise never comes first.
    assert found.purity[0, 3:].isnan().all() and found.to_dict()["scored_latents"] == [3, 6]


def test_labels_of_contexts_are_permuted_as_wholes():
    """A latent that fires in some contexts only looks pure by chance too, if a label has few contexts."""
    dense = torch.zeros(400, 2)
    dense[:100, 0] = 1
    dense[::2, 1] = 1
    contexts = torch.tensor([0, 1, 0, 1])
    found = score(recorded(dense, 2, context_length=100), contexts, "ab", budgets=[2], permutations=200)

    assert found.purity[0].tolist() == [1.0, 0.5]
    # The one context it fires in has one label, whatever the permutation.
    assert found.purity_by_chance[0, 0] == 1.0 and not found.above_chance[0, 0]
    as_tokens = score(
        recorded(dense, 2, context_length=100), contexts.repeat_interleave(100), "ab", budgets=[2], permutations=200
    )
    assert as_tokens.purity_by_chance[0, 0] == 1.0 and not as_tokens.above_chance[0, 0]


@pytest.mark.parametrize("lengths", [[20], [8, 14, 20, 38]], ids=["of one length", "of several"])
def test_above_chance_is_as_rare_where_labels_and_latents_come_in_contexts(lengths):
    """No label has to do with a latent; both are common in some contexts and missing in others."""
    torch.manual_seed(0)
    sizes = torch.tensor(lengths).repeat(120 // len(lengths))
    contexts = torch.arange(120).repeat_interleave(sizes)
    found = []
    for repetition in range(4):
        fires = (torch.rand(len(contexts), 150) < 0.3) & (torch.rand(120, 150) < 0.3)[contexts]
        activations = recorded(torch.rand(len(contexts), 150) * fires, 150)
        activations.context_starts = torch.tensor([0, *sizes.cumsum(0)])
        shares = torch.distributions.Dirichlet(torch.full((6,), 0.3)).sample((120,))
        labels = torch.multinomial(shares[contexts], 1).flatten()
        scores = score(activations, labels, "abcdef", budgets=[150], min_fires=5, seed=repetition)
        found.append(scores.to_dict()["above_chance"][0])
    # 1 in 21 is expected. Labels that are shifted along the text are below the real ones in 1 of 9.
    assert sum(found) / 4 < 0.08


def test_labels_of_the_tokens_of_one_context_are_shifted():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (300,))
    found = score(recorded(torch.nn.functional.one_hot(labels, 3).float(), 3, context_length=300), labels, budgets=[3])

    assert found.purity[0].tolist() == [1, 1, 1] and found.purity_by_chance.max() < 0.6 and found.above_chance.all()


def test_a_label_has_as_many_tokens_in_a_permutation_as_before_whatever_the_lengths_of_contexts():
    activations = recorded(torch.ones(400, 1), 1)
    activations.context_starts = torch.tensor([0, 5, 20, 280, 330, 400])
    found = score(activations, torch.tensor([0, 1, 0, 2, 1]), budgets=[1])

    # It fires on every token, so that its purity is the share of the most frequent label.
    assert found.purity[0, 0] == 265 / 400
    assert found.purity_by_chance[0, 0] == pytest.approx(265 / 400, abs=1e-12)


def test_above_chance_is_as_rare_as_it_should_be_without_a_relation():
    activations = random_activations(tokens=600, d_sae=200, k=20)
    found = score(activations, torch.randint(0, 3, (600,)), budgets=[20], permutations=19)

    # 1 in 20 is expected; 200 latents give a standard deviation of 1.5 %.
    assert found.to_dict()["above_chance"][0] < 0.12


def test_the_table_and_the_json_hold_every_budget():
    found = score(random_activations(), torch.randint(0, 3, (300,)))
    lines = str(found).splitlines()

    assert [line.split()[0] for line in lines[1:-1]] == ["1", "2", "4", "6"]
    assert lines[-1] == "300 tokens, 3 labels"
    restored = json.loads(json.dumps(found.to_dict()))
    assert restored["purity"][3] == pytest.approx(found.purity[3].nanmean().item())
    assert float(lines[4].split()[2]) == pytest.approx(restored["purity"][3], rel=1e-3)


def test_the_same_seed_gives_the_same_permutations():
    activations, labels = random_activations(), torch.randint(0, 3, (300,))
    first, again, other = (score(activations, labels, seed=seed) for seed in (0, 0, 1))

    assert torch.equal(first.information_by_chance, again.information_by_chance)
    assert not torch.equal(first.information_by_chance, other.information_by_chance)


@pytest.mark.parametrize(
    "labels, options, message",
    [
        (None, {}, "no labels: give `labels` and `label_names`, or texts as a mapping"),
        (torch.zeros(7), {}, r"one entry per token \(300\) or per context \(60\), got \(7,\)"),
        (torch.full((300,), 3), {}, r"labels must be in \[-1, 3\), places in label_names, got 3…3"),
        (torch.zeros(300), {}, "expected tokens of at least 2 labels, got 1 on 300 tokens"),
        (torch.full((300,), -1), {}, "expected tokens of at least 2 labels, got 0 on 0 tokens"),
        (
            torch.arange(300) % 3,
            {"budgets": [7]},
            r"budgets must be in \[1, 6\], the largest rank on record, got \[7\]",
        ),
        (torch.arange(300) % 3, {"permutations": 0}, "permutations must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        score(random_activations(), labels, **options)


@pytest.mark.parametrize(
    "labels, options, message",
    [
        (torch.full((300,), 0.5), {}, "labels must be whole numbers, places in label_names"),
        (torch.full((300,), torch.nan), {}, "labels must be whole numbers, places in label_names"),
        (torch.arange(300) % 3, {"permutations": 2.5}, "permutations must be an integer, got 2.5"),
        (torch.arange(300) % 3, {"min_fires": True}, "min_fires must be an integer, got True"),
        (torch.arange(300) % 3, {"budgets": [True]}, "budgets must be integers, got"),
    ],
)
def test_what_is_no_number_of_its_kind_is_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        score(random_activations(), labels, **options)


def test_a_list_of_labels_is_as_good_as_a_tensor():
    activations, labels = random_activations(), torch.randint(0, 3, (300,))

    found, expected = (score(activations, given) for given in (labels.tolist(), labels))

    assert torch.equal(found.best_label, expected.best_label)
