"""Dense float64 oracles: every weight of every candidate, straight from the formulas."""

import torch


def weighted(y, x, sigma, weights):
    """Per query and row of weights: probabilities of the candidates, shape (B, rows, N)."""
    y, x = y.double().flatten(1), x.double().flatten(1)
    squares = (y[:, None] - x[None]) ** 2
    distances = torch.einsum("bin,mn->bmi", squares, weights.double())
    return torch.softmax(-distances / (2 * sigma**2), -1)


def coordinatewise(y, x, sigma, weights):
    """Every coordinate from its own row of weights; also 1 / sum w^2 and the top candidate."""
    w = weighted(y, x, sigma, weights)
    mean = torch.einsum("bmi,im->bm", w, x.double().flatten(1))
    found = mean, 1 / w.square().sum(-1), w.argmax(-1)
    return tuple(part.view_as(y) for part in found)


def window_weights(shape, k):
    """(n, n) ones where two coordinates' pixels are within (k - 1) / 2 along both axes."""
    c, h, w = shape
    rows = torch.arange(h).view(1, h, 1).expand(c, h, w).flatten()
    columns = torch.arange(w).view(1, 1, w).expand(c, h, w).flatten()
    near = [(a[:, None] - a).abs() <= k // 2 for a in (rows, columns)]
    return (near[0] & near[1]).double()


def covariance(x):
    """Mean and population covariance of images, float64."""
    flat = x.double().flatten(1)
    return flat.mean(0), torch.cov(flat.T, correction=0)


def wiener_matrix(x, sigma):
    """Covariance (covariance + sigma^2)^-1."""
    _, cov = covariance(x)
    return torch.linalg.solve(cov + sigma**2 * torch.eye(len(cov)).double(), cov, left=False)


def local_mask(w, tau):
    diagonal = w.diagonal().clone()
    diagonal[diagonal.abs() < 1e-6] = 1
    r = (w / diagonal[:, None]).abs()
    return (r >= tau * r.max()).double()


def els(y, x, sigma, k):
    """Equivariant local score by enumeration of all patches of all images."""
    half, (_, _, h, w) = k // 2, y.shape

    def cut(i, j):
        return tuple((min(half, a), min(half, n - 1 - a)) for a, n in ((i, h), (j, w)))

    def patch(image, i, j):
        (up, down), (left, right) = cut(i, j)
        return image[:, i - up : i + down + 1, j - left : j + right + 1].double()

    out = torch.empty(y.shape, dtype=torch.float64)
    n_eff, top = torch.empty_like(out), torch.empty(y.shape, dtype=torch.int64)
    for b in range(len(y)):
        for i in range(h):
            for j in range(w):
                logits, centres, owners = [], [], []
                for number, image in enumerate(x):
                    for p in range(h):
                        for q in range(w):
                            if cut(p, q) == cut(i, j):
                                difference = patch(y[b], i, j) - patch(image, p, q)
                                logits.append(-(difference**2).sum() / (2 * sigma**2))
                                centres.append(image[:, p, q].double())
                                owners.append(number)
                weights = torch.softmax(torch.stack(logits), 0)
                out[b, :, i, j] = weights @ torch.stack(centres)
                n_eff[b, :, i, j] = 1 / weights.square().sum()
                top[b, :, i, j] = owners[int(weights.argmax())]
    return out, n_eff, top


def pspc(y, x, sigma, size):
    """Posterior mean of every crop, summed and divided by the coverage."""
    h, w = y.shape[2:]
    total, coverage = torch.zeros(y.shape, dtype=torch.float64), torch.zeros(h, w).double()
    for i in range(h - size + 1):
        for j in range(w - size + 1):
            place = (slice(None), slice(None), slice(i, i + size), slice(j, j + size))
            ones = torch.ones(1, x[place][0].numel())
            weights = weighted(y[place], x[place], sigma, ones)[:, 0]
            total[place] += torch.einsum("bi,ichw->bchw", weights, x[place].double())
            coverage[place[2:]] += 1
    return total / coverage
