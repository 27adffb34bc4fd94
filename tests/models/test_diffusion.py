"""Tests of the diffusion schedules, samplers and likelihood on Gaussian data, where score and likelihood are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.config import NoiseConfig
from dalle_jax.models.diffusion import sampler as sampling
from dalle_jax.models.diffusion.likelihood import bits_per_dim, log_likelihood
from dalle_jax.models.diffusion.sampler import (
    SAMPLERS,
    NonFiniteSampleError,
    check_finite,
    combine_guidance,
    dynamic_threshold,
    sample,
)
from dalle_jax.models.diffusion.schedule import (
    add_noise,
    alpha_sigma,
    beta_schedule,
    convert_prediction,
    loss_weight,
    low_discrepancy_times,
    prediction_target,
    time_grid,
)

LINEAR = NoiseConfig()
KINDS = {
    "linear": LINEAR,
    "cosine": NoiseConfig(kind="cosine"),
    "ddpm": NoiseConfig(kind="ddpm"),
    "ve": NoiseConfig(kind="ve"),
    "edm": NoiseConfig(kind="edm", sigma_min=0.002, sigma_max=80.0),
    "zero": NoiseConfig(kind="linear", zero_terminal_snr=True),
    "shifted": NoiseConfig(kind="cosine", shift=3.0),
    "shifted ddpm": NoiseConfig(kind="ddpm", shift=0.5, zero_terminal_snr=True),
}
MEAN = np.array([0.7, -0.4])
COV = np.array([[0.5, 0.3], [0.3, 0.4]])
GAUSS = (jnp.asarray(MEAN, jnp.float32), jnp.asarray(COV, jnp.float32))


def gaussian_denoiser(context, x, t, alpha, sigma):
    """Compute E[x_0 | x_t] for normal data in closed form."""
    mean, cov = context
    gain = alpha * cov @ jnp.linalg.inv(alpha**2 * cov + sigma**2 * jnp.eye(2))
    return mean[None] + (x - alpha * mean[None]) @ gain.T


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def run_sampler(noise=LINEAR, n=4, context=GAUSS, seed=0, **options):
    return sample(noise, gaussian_denoiser, context, keys(n, seed), (2,), **options)


# --- schedules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_derivatives_equal_finite_differences(name):
    cfg, h = KINDS[name], 1e-6
    t = np.array([0.05003, 0.31007, 0.77003, 0.98007])
    at, up, down = alpha_sigma(cfg, t), alpha_sigma(cfg, t + h), alpha_sigma(cfg, t - h)
    np.testing.assert_allclose(at.d_alpha, (up.alpha - down.alpha) / (2 * h), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(at.d_sigma, (up.sigma - down.sigma) / (2 * h), rtol=1e-5, atol=1e-8)
    traced = alpha_sigma(cfg, jnp.asarray(t, jnp.float32))
    for a, b in zip(traced, at, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine", "ddpm", "zero", "shifted", "shifted ddpm"])
def test_variance_is_preserved_and_alpha_decreases(name):
    at = alpha_sigma(KINDS[name], np.linspace(0, 1, 101))
    np.testing.assert_allclose(at.alpha**2 + at.sigma**2, 1.0, rtol=1e-12)
    assert at.alpha[0] == 1 and (np.diff(at.alpha) < 0).all()
    assert at.alpha[-1] == 0 if KINDS[name].zero_terminal_snr else 0 < at.alpha[-1] < 0.01


@pytest.mark.parametrize("kind", ["linear", "cosine", "ddpm"])
def test_shift_multiplies_noise_over_signal(kind):
    """2301.11093, eq. 6: the log SNR changes by -2 log(shift) at every time."""
    t = np.linspace(0.01, 0.99, 7)
    plain, shifted = (alpha_sigma(NoiseConfig(kind=kind, shift=shift), t) for shift in (1.0, 4.0))
    np.testing.assert_allclose(np.log(shifted.snr), np.log(plain.snr) - 2 * math.log(4.0), rtol=1e-9)


def test_ddpm_is_the_published_product():
    """2006.11239, 4: T = 1000, beta from 1e-4 to 0.02; alpha-bar is the product of 1 - beta."""
    beta = beta_schedule(KINDS["ddpm"])
    assert (beta[0], beta[-1]) == (1e-4, 0.02)
    bar, product = alpha_sigma(KINDS["ddpm"], np.arange(1, 1001) / 1000).alpha ** 2, 1.0
    for i in range(1000):
        product *= 1 - beta[i]
        assert math.isclose(bar[i], product, rel_tol=1e-9)
    # the continuous schedule is its limit
    near = alpha_sigma(LINEAR, np.arange(1, 1001) / 1000).alpha
    np.testing.assert_allclose(np.sqrt(bar), near, atol=2e-3)


def test_sigmas_of_ve_and_edm_by_hand():
    at = alpha_sigma(KINDS["ve"], np.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(at.sigma, [0.01, math.sqrt(0.01 * 50), 50.0])
    edm = alpha_sigma(KINDS["edm"], np.array([0.0, 0.5, 1.0])).sigma
    np.testing.assert_allclose(edm, [0.002, ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7, 80.0])


@pytest.mark.parametrize("source", ["eps", "x0", "v", "score"])
@pytest.mark.parametrize("want", ["eps", "x0", "v", "score"])
@pytest.mark.parametrize("name", ["linear", "ve"])
def test_predictions_convert_both_ways(source, want, name):
    x0, noise = (jax.random.normal(k, (3, 4)) for k in keys(2))
    t = jnp.array([0.2, 0.5, 0.8])
    at = alpha_sigma(KINDS[name], t)
    x = add_noise(KINDS[name], x0, noise, t)
    prediction, target = (prediction_target(p, x0, noise, at.alpha, at.sigma) for p in (source, want))
    got = convert_prediction(source, want, prediction, x, at.alpha, at.sigma)
    scale = float(jnp.abs(target).max()) * max(1.0, float(at.sigma.max() / at.alpha.min()))
    np.testing.assert_allclose(got, target, atol=1e-5 * scale)


def test_score_is_the_gradient_of_the_log_density():
    """For x_t given x_0 it is -(x - alpha x_0) / sigma^2."""
    at = alpha_sigma(LINEAR, np.asarray(0.4))
    x0, x = jnp.array([[0.3]]), jnp.array([[0.9]])
    log_density = lambda x: -0.5 * jnp.sum((x - at.alpha * x0) ** 2) / at.sigma**2  # noqa: E731
    got = convert_prediction("x0", "score", x0, x, at.alpha, at.sigma)
    np.testing.assert_allclose(got, jax.grad(log_density)(x), rtol=1e-5)


@pytest.mark.parametrize("weighting", ["min_snr", "likelihood"])
def test_weighted_loss_does_not_depend_on_the_prediction(weighting):
    """The same wrong x_0 has the same loss with every prediction type."""
    t = jnp.array([0.15, 0.5, 0.9])
    at = alpha_sigma(LINEAR, t)
    x0, wrong, noise = (jax.random.normal(k, (3, 4)) for k in keys(3))
    x = add_noise(LINEAR, x0, noise, t)
    costs = []
    for p in ("eps", "x0", "v", "score"):
        error = convert_prediction("x0", p, wrong, x, at.alpha, at.sigma) - prediction_target(
            p, x0, noise, at.alpha, at.sigma
        )
        costs.append(loss_weight(weighting, p, at) * jnp.mean(error**2, axis=1))
    for cost in costs[1:]:
        np.testing.assert_allclose(cost, costs[0], rtol=1e-3)
    if weighting == "min_snr":
        want = jnp.minimum(at.snr, 5.0) * jnp.mean((wrong - x0) ** 2, axis=1)
    else:  # beta / (2 sigma^2) on eps: half the rate of the log SNR; 2107.00630, eq. 17
        beta = LINEAR.beta_min + t * (LINEAR.beta_max - LINEAR.beta_min)
        eps = convert_prediction("x0", "eps", wrong, x, at.alpha, at.sigma)
        want = beta / (2 * at.sigma**2) * jnp.mean((eps - noise) ** 2, axis=1)
    np.testing.assert_allclose(costs[0], want, rtol=1e-3)


def test_low_discrepancy_times():
    """One time lies in each interval, and each single time is uniform."""
    t = np.asarray(low_discrepancy_times(LINEAR, jax.random.key(3), 16))
    fraction = (t - LINEAR.t_min) / (1 - LINEAR.t_min)
    assert sorted(np.floor(fraction * 16 + 1e-4).astype(int) % 16) == list(range(16))
    firsts = [float(low_discrepancy_times(LINEAR, k, 4)[0]) for k in keys(50)]
    assert np.ptp(firsts) > 0.8


@pytest.mark.parametrize("spacing", ["uniform", "log_snr", "karras"])
def test_time_grids(spacing):
    grid = time_grid(LINEAR, 20, 0.9, spacing)
    assert grid.shape == (20,) and (np.diff(grid) < 0).all() and grid[0] == 0.9 and grid[-1] == LINEAR.t_min
    at = alpha_sigma(LINEAR, grid)
    even = {"uniform": grid, "log_snr": np.log(at.snr), "karras": (at.sigma / at.alpha) ** (1 / 7)}[spacing]
    np.testing.assert_allclose(np.diff(even), np.diff(even).mean(), rtol=1e-3)


# --- samplers on normal data ------------------------------------------------------------------------------

HARD = {"ancestral": 1000, "ddim": 200, "euler": 1000, "heun": 100, "dpm++2m": 50, "pc": 500}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["linear", "ve"])
def test_sampler_recovers_mean_and_covariance(name, kind):
    n, spacing = 8_000, "uniform" if name in ("ancestral", "pc") else "log_snr"
    options = {"corrector_snr": 0.05} if name == "pc" else {}
    x = np.asarray(
        run_sampler(KINDS[kind], n, sampler=name, num_steps=HARD[name], spacing=spacing, **options).x,
        np.float64,
    )
    # six standard errors of the sample, and 2% of the covariance for the discretization
    tolerance = 6 / math.sqrt(n)
    prior = alpha_sigma(KINDS[kind], 1.0).alpha * np.abs(MEAN).max() / alpha_sigma(KINDS[kind], 1.0).sigma
    np.testing.assert_allclose(x.mean(axis=0), MEAN, atol=tolerance * 0.71 + prior)
    np.testing.assert_allclose(np.cov(x.T), COV, atol=tolerance * 0.71 + 0.02 * COV.max())


def covariance_error(noise, **options):
    """Compute the error of the covariance of a deterministic sampler without sampling noise.

    It is a linear map x = A z + b here, and rows start from the same keys in every call, so least squares over many z
    give A.
    """
    z = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), (2,)))(keys(64))
    z = np.column_stack([np.asarray(z, np.float64), np.ones(64)])
    x = np.asarray(run_sampler(noise, 64, **options).x, np.float64)
    solved, *_ = np.linalg.lstsq(z, x, rcond=None)
    return np.abs(solved[:2].T @ solved[:2] - COV).max()


@pytest.mark.parametrize(
    ("name", "order", "spacing"),
    [
        ("ddim", 1, "log_snr"),
        ("euler", 1, "log_snr"),
        ("heun", 2, "log_snr"),
        ("dpm++2m", 2, "log_snr"),
        ("dpm++2m", 2, "karras"),  # steps of different lengths
    ],
)
def test_order_of_convergence(name, order, spacing):
    """Twice the steps halve the error of first order and quarter that of second order."""
    options = {"sampler": name, "spacing": spacing}
    coarse, fine = (covariance_error(NoiseConfig(t_min=1e-4), num_steps=s, **options) for s in (24, 48))
    assert fine < coarse / (1.6 if order == 1 else 2.8), (coarse, fine)
    assert fine < (0.1 if order == 1 else 0.02)


def test_dpm_solver_extrapolates_to_the_middle_of_the_step():
    """2211.01095, algorithm 2: an x_0 that is linear in the log SNR is evaluated at the middle of the step, for steps
    of any lengths."""
    grid = time_grid(LINEAR, 12, spacing="karras")
    lam = 0.5 * np.log(alpha_sigma(LINEAR, grid).snr)
    second = np.asarray(sampling._step_table(LINEAR, grid)["second_order"])[1:-1]
    assert np.ptp(np.diff(lam)) > 0.1  # of different lengths
    np.testing.assert_allclose(lam[1:-1] + second * np.diff(lam)[:-1], (lam[1:-1] + lam[2:]) / 2, rtol=1e-4)


def test_ddim_with_eta_one_is_ancestral():
    """With the same noise they give the same samples."""
    a = run_sampler(sampler="ancestral", num_steps=20, n=8).x
    b = run_sampler(sampler="ddim", eta=1.0, num_steps=20, n=8).x
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert float(jnp.abs(a - run_sampler(sampler="ddim", num_steps=20, n=8).x).max()) > 0.1


def test_ancestral_step_is_the_ddpm_posterior():
    """2006.11239, eq. 7 in terms of the betas, for one step in the middle."""
    cfg = KINDS["ddpm"]
    i = 500  # x_i -> x_{i-1} with beta[i - 1]
    beta, bar = beta_schedule(cfg), np.cumprod(1 - beta_schedule(cfg))
    b, bar_t, bar_s = beta[i - 1], bar[i - 1], bar[i - 2]
    steps = sampling._step_table(cfg, np.array([i / 1000, (i - 1) / 1000]))
    std, sigma, sigma_s = (float(steps[k][0]) for k in ("posterior_std", "sigma", "sigma_s"))
    np.testing.assert_allclose(std**2, (1 - bar_s) / (1 - bar_t) * b, rtol=1e-4)
    left = math.sqrt(sigma_s**2 - std**2)
    x, x0 = 0.8, -0.3
    eps = (x - math.sqrt(bar_t) * x0) / sigma
    want = math.sqrt(bar_s) * b / (1 - bar_t) * x0 + math.sqrt(1 - b) * (1 - bar_s) / (1 - bar_t) * x
    np.testing.assert_allclose(float(steps["alpha_s"][0]) * x0 + left * eps, want, rtol=1e-4)


def test_zero_terminal_snr_samples():
    x = np.asarray(run_sampler(KINDS["zero"], 20_000, sampler="dpm++2m", num_steps=50, spacing="log_snr").x)
    np.testing.assert_allclose(x.mean(axis=0), MEAN, atol=0.04)
    np.testing.assert_allclose(np.cov(x.T), COV, atol=0.04)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_depends_on_its_own_key_alone(name):
    together = run_sampler(n=4, sampler=name, num_steps=4).x
    alone = sample(LINEAR, gaussian_denoiser, GAUSS, keys(4)[2:3], (2,), sampler=name, num_steps=4).x
    np.testing.assert_allclose(together[2:3], alone, atol=1e-5)


# --- guidance, thresholding, inpainting, image-to-image ---------------------------------------------------


def test_guidance_by_hand():
    a, b = jnp.array([3.0]), jnp.array([1.0])
    assert combine_guidance(a, b, 2.0, 0.5)[0] == 5 and combine_guidance(a, b, 0.0, 0.5)[0] == 1
    assert combine_guidance(a, b, 2.0, 0.5, (0.6, 1.0))[0] == 3


def test_threshold_by_hand():
    x = jnp.array([[0.5, -2.0, 4.0, 0.0], [0.5, -0.2, 0.1, 0.0]])
    np.testing.assert_allclose(dynamic_threshold(x, 1.0), [[0.125, -0.5, 1, 0], x[1]])
    np.testing.assert_allclose(dynamic_threshold(x, 0.0)[0], [0.5, -1, 1, 0])


def test_inpainting():
    """The kept value is exact; the mean of the other moves more than half of the way from its marginal to its
    conditional mean, not all of it, as replacing pixels is not an exact conditional sampler (2201.09865, 4.2)."""
    n, value = 4000, 1.7
    image = jnp.broadcast_to(jnp.array([value, 0.0]), (n, 2))
    mask = jnp.broadcast_to(jnp.array([True, False]), (n, 2))
    x = run_sampler(n=n, sampler="ancestral", num_steps=100, inpaint_image=image, inpaint_mask=mask).x
    assert (x[:, 0] == jnp.float32(value)).all()
    conditional = MEAN[1] + COV[1, 0] / COV[0, 0] * (value - MEAN[0])  # 0.2; the marginal mean is -0.4
    assert 0.5 < (float(x[:, 1].mean()) - MEAN[1]) / (conditional - MEAN[1]) < 1.05


def test_image_to_image_is_nearer_for_earlier_start_times():
    image = jnp.broadcast_to(jnp.array([2.0, 1.5]), (500, 2))
    gaps = [
        float(
            jnp.abs(
                run_sampler(n=500, sampler="ddim", num_steps=20, image=image, start_time=s).x - image
            ).mean()
        )
        for s in (0.05, 0.3, 0.8)
    ]
    assert gaps[0] < 0.2 and gaps[0] < gaps[1] < gaps[2]


def test_the_last_frame_is_the_sample():
    output = run_sampler(sampler="ddim", num_steps=10, num_frames=4)
    assert output.frames.shape == (4, 4, 2)
    np.testing.assert_array_equal(output.frames[-1], output.x)
    assert float(jnp.abs(output.frames[0] - output.x).max()) > 1e-3
    np.testing.assert_array_equal(output.x, run_sampler(sampler="ddim", num_steps=10).x)


def test_the_first_nonfinite_step_is_reported():
    def denoise(context, x, t, alpha, sigma):
        bad = (t < context) & (jnp.arange(len(x)) == 1)
        return jnp.where(bad[:, None], jnp.nan, 0.0 * x)

    output = sample(LINEAR, denoise, 0.5, keys(3), (2,), sampler="ddim", num_steps=11)
    assert list(output.first_nonfinite_step) == [
        -1,
        6,
        -1,
    ]  # times 1, 0.9, ..., of which the seventh is 0.4006
    with pytest.raises(NonFiniteSampleError, match=r"in sampling step 7 \(rows 1\)"):
        check_finite(output)
    check_finite(run_sampler(num_steps=3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sampler": "plms"}, "Expected sampler ancestral, ddim.* got 'plms'"),
        ({"num_steps": 0}, "num_steps of at least 1, got 0"),
        (
            {"noise": KINDS["ddpm"], "num_steps": 1001},
            r"num_steps in \[1, 1000\] \(noise\.num_timesteps\), got 1001",
        ),
        ({"spacing": "even"}, "spacing uniform, log_snr or karras, got 'even'"),
        ({"num_frames": 51}, r"num_frames in \[0, 50\] \(num_steps\), got 51"),
        ({"inpaint_mask": jnp.ones((4, 2), bool)}, "both inpaint_image and inpaint_mask"),
        (
            {"inpaint_mask": jnp.ones((4, 3), bool), "inpaint_image": jnp.ones((4, 2))},
            r"inpaint_mask of shape \(4, 2\), one image per key, got \(4, 3\)",
        ),
        (
            {"inpaint_mask": jnp.ones((4, 2)), "inpaint_image": jnp.ones((4, 2))},
            "bool inpaint_mask.* got float32",
        ),
        ({"start_time": 0.5}, "both an image and a start_time below 1"),
        ({"image": jnp.ones((4, 2)), "start_time": 1e-4}, r"start_time in \(.*, 1\], got 0\.0001"),
    ],
)
def test_invalid_sampler_options_raise(options, match):
    with pytest.raises(ValueError, match=match):
        run_sampler(**options)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"beta_min": 30.0}, "0 < beta_min < beta_max in NoiseConfig, got 30.0 and 20.0"),
        ({"sigma_min": 60.0}, "0 < sigma_min < sigma_max in NoiseConfig, got 60.0 and 50.0"),
        ({"num_timesteps": 10}, "num_timesteps of at least 2 and more than beta_max 20.0, got 10"),
        ({"rho": 0.5}, "rho of at least 1, got 0.5"),
        ({"t_min": 0.0}, r"t_min in \(0, 1\), got 0.0"),
        ({"kind": "ve", "zero_terminal_snr": True}, "zero_terminal_snr False with kind ve, got True"),
        ({"shift": 0.0}, "NoiseConfig.shift above 0, got 0.0"),
        ({"kind": "edm", "shift": 2.0}, "shift 1 with kind edm, got 2.0. Set sigma_min and sigma_max"),
    ],
)
def test_invalid_noise_configurations_raise(values, match):
    with pytest.raises(ValueError, match=match):
        NoiseConfig(**values)


# --- likelihood -------------------------------------------------------------------------------------------


def closed_form(centered, cov):
    quadratic = np.einsum("bi,ij,bj->b", centered, np.linalg.inv(cov), centered)
    return -0.5 * quadratic - 0.5 * np.log(np.linalg.det(2 * np.pi * cov))


@pytest.mark.parametrize(
    ("kind", "mean"),
    [("linear", MEAN), ("linear", 0 * MEAN), ("cosine", 0 * MEAN), ("ddpm", 0 * MEAN), ("ve", MEAN)],
)
def test_likelihood_is_the_closed_form(kind, mean):
    """Within 1e-3 bits per value. The mean is zero where the schedule keeps a part of it in x_1, which would shift the
    prior."""
    cfg = NoiseConfig(kind=kind, t_min=1e-4, sigma_min=1e-3, sigma_max=2000.0, beta_max=40.0)
    x = np.random.default_rng(0).multivariate_normal(mean, COV, 16)
    context = (jnp.asarray(mean, jnp.float32), GAUSS[1])
    got = log_likelihood(
        cfg,
        gaussian_denoiser,
        context,
        jnp.asarray(x, jnp.float32),
        jax.random.key(0),
        num_steps=200,
        trace="exact",
    )
    np.testing.assert_allclose(bits_per_dim(got, 2), bits_per_dim(closed_form(x - mean, COV), 2), atol=1e-3)


def test_hutchinson_is_unbiased():
    x = jnp.asarray(np.random.default_rng(0).multivariate_normal(MEAN, COV, 1), jnp.float32)
    exact = log_likelihood(
        LINEAR, gaussian_denoiser, GAUSS, x, jax.random.key(0), num_steps=50, trace="exact"
    )
    many = jnp.broadcast_to(x, (2000, 2))
    got = log_likelihood(LINEAR, gaussian_denoiser, GAUSS, many, jax.random.key(1), num_steps=50)
    error = float(got.std()) / math.sqrt(2000)
    assert error > 0 and abs(float(got.mean() - exact[0])) < 5 * error


def test_bits_per_dim_by_hand():
    """The uniform distribution over 256 gray levels, density 1/2 on [-1, 1], has 8 bits."""
    np.testing.assert_allclose(bits_per_dim(jnp.array([12 * math.log(0.5)]), 12, 127.5), 7.9943, atol=1e-4)
    np.testing.assert_allclose(bits_per_dim(jnp.array([12 * math.log(0.5)]), 12, 128.0), 8.0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_steps": 0}, "num_steps and num_probes of at least 1, got 0 and 1"),
        ({"trace": "skilling"}, "trace hutchinson or exact, got 'skilling'"),
        ({"cfg": KINDS["zero"]}, "zero terminal SNR"),
    ],
)
def test_invalid_likelihood_options_raise(options, match):
    cfg = options.pop("cfg", LINEAR)
    with pytest.raises(ValueError, match=match):
        log_likelihood(cfg, gaussian_denoiser, GAUSS, jnp.ones((1, 2)), jax.random.key(0), **options)
