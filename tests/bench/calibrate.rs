//! One half of `scaling.sh`: what a core of this machine does a second, as constants of `fm-dist
//! check --cluster`.
//!
//! `mpirun -n CORES calibrate REPEATS` prints a `[cluster.cpu<CORES>]` for `clusters.toml`. Every
//! rank, of one thread, does the same at the same time, so that what cores share is shared; each
//! number is the median of rank 0's repeats. Nothing here knows what a model's step takes.

use std::hint::black_box;
use std::time::{Duration, Instant};

use fm_dist::collective::{self, Collective, Launch, ReduceOp};
use fm_dist::libtorch;
use fm_dist::nn::attention::attend;
use fm_dist::optim::{AdamW, Optimizer, Slice};
use fm_dist::rng::{Key, Purpose};
use tch::{Device, Kind, Tensor};

/// Rows, inputs and outputs of a product: a feed-forward part of a small transformer.
const PRODUCT: [i64; 3] = [1024, 512, 2048];
/// Samples, heads, tokens and width of a head of an attention.
const ATTENTION: [i64; 4] = [4, 8, 320, 64];
/// Elements of a hidden activation, and how many are kept: more than caches hold.
const ACTIVATION: i64 = 1 << 20;
const KEPT: usize = 64;
/// Parameters of a block of a small transformer: FLUX's double block at a width of 512 has as many.
const BLOCK: i64 = 9 << 20;
/// Small operators and messages that are timed as one.
const BATCH: usize = 1000;

struct Bench<'w> {
    world: &'w dyn Collective,
    repeats: usize,
}

impl Bench<'_> {
    /// Median seconds of an operation that every rank begins at once; the first two are rehearsals.
    fn seconds(&self, mut operation: impl FnMut()) -> f64 {
        let mut repeat = || {
            self.world.barrier().expect("sound peers");
            let began = Instant::now();
            operation();
            began.elapsed().as_secs_f64()
        };
        repeat();
        repeat();
        let mut seconds: Vec<f64> = (0..self.repeats).map(|_| repeat()).collect();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    }

    fn product_rate(&self, kind: Kind) -> f64 {
        let [rows, inputs, outputs] = PRODUCT;
        let (x, weight) = (random(&[rows, inputs], kind), random(&[outputs, inputs], kind));
        (2 * rows * inputs * outputs) as f64
            / self.seconds(|| drop(black_box(x.linear(&weight, None::<&Tensor>))))
    }

    fn attention_rate(&self, kind: Kind) -> f64 {
        let [samples, heads, tokens, width] = ATTENTION;
        let [query, key, value] =
            std::array::from_fn(|_| random(&[samples, tokens, heads, width], kind));
        let attend = || attend(&query, &key, &value, None);
        (4 * samples * heads * tokens * tokens * width) as f64
            / self.seconds(|| drop(black_box(attend())))
    }

    /// Operators as they stand between products: each reads what the one before left and another
    /// tensor, and what it writes is kept.
    fn memory_rate(&self) -> f64 {
        let (first, other) =
            (random(&[ACTIVATION], Kind::Float), random(&[ACTIVATION], Kind::Float));
        let chain = || {
            std::iter::successors(Some(first.shallow_clone()), |last| Some(last * &other))
                .take(1 + KEPT)
                .collect::<Vec<_>>()
        };
        (KEPT as i64 * 3 * 4 * ACTIVATION) as f64 / self.seconds(|| drop(black_box(chain())))
    }

    /// AdamW, each tensor counted once a reading and once a writing: four read, three written.
    fn update_rate(&self) -> f64 {
        let new = || random(&[BLOCK], Kind::Float);
        let (mut params, gradient, mut state) = (new(), new(), [new(), new().square()]);
        let adamw = AdamW::default().on(Device::Cpu).expect("a CPU has what it needs");
        let decayed = [(0, BLOCK)];
        let mut update = || {
            let (params, state) = (&mut params, &mut state);
            adamw.update(
                Slice {
                    params,
                    gradient: &gradient,
                    gradient_factor: 1.0,
                    state,
                    computed: None,
                    average: None,
                    decayed: &decayed,
                    decay_factor: 1.0,
                },
                1e-4,
                10,
            )
        };
        ((4 + 3) * 4 * BLOCK) as f64 / self.seconds(&mut update)
    }

    /// An operator on next to nothing, with its node of the graph.
    fn launch_seconds(&self) -> f64 {
        let (a, b) =
            (random(&[16], Kind::Float).set_requires_grad(true), random(&[16], Kind::Float));
        self.seconds(|| (0..BATCH).for_each(|_| drop(black_box(&a * &b)))) / BATCH as f64
    }

    fn all_reduce_seconds(&self, elements: i64, count: usize) -> f64 {
        let buffer = Tensor::zeros([elements], (Kind::Float, Device::Cpu));
        let all_reduce = || {
            self.world
                .all_reduce(vec![buffer.shallow_clone()], ReduceOp::Sum)
                .expect("a sound call")
                .wait()
        };
        self.seconds(|| (0..count).for_each(|_| all_reduce().expect("sound peers"))) / count as f64
    }
}

fn random(size: &[i64], kind: Kind) -> Tensor {
    let draw = || Tensor::randn(size, (Kind::Float, Device::Cpu));
    Key::new(1, Purpose::Test).seeded(draw).to_kind(kind)
}

fn main() {
    let repeats = std::env::args()
        .skip(1)
        .find_map(|text| text.parse().ok())
        .expect("usage: calibrate REPEATS");
    // As a rank of one thread sets itself up.
    tch::set_num_threads(1);
    libtorch::share_memory_among_threads();
    libtorch::keep_freed_memory();
    let world = collective::connect(Launch::Auto, Duration::from_secs(60))
        .expect("a launcher put this process among others");
    let (bench, cores) = (Bench { world: &*world, repeats }, world.world_size());
    let rates = |kind| (bench.product_rate(kind), bench.attention_rate(kind));
    let (float32, bfloat16) = (rates(Kind::Float), rates(Kind::BFloat16));
    let (memory, update, launch) =
        (bench.memory_rate(), bench.update_rate(), bench.launch_seconds());
    let message = bench.all_reduce_seconds(1, BATCH);
    // What a large all-reduce takes beside its messages is passes over its bytes: to every other
    // rank a copy out, a sum and a copy in of a shard, and one copy more; see `memory_seconds` in
    // `src/plan/prediction/links.rs`.
    let others = (cores - 1) as f64;
    let passes = (3.0 * others + 1.0) * (4 * BLOCK) as f64 / cores as f64;
    let pass = passes / (bench.all_reduce_seconds(BLOCK, 1) - 2.0 * others * message);
    if world.rank() == 0 {
        let [rows, inputs, outputs] = PRODUCT;
        println!("[cluster.cpu{cores}]");
        println!("about = \"one machine of {cores} cores, which ranks share\"");
        println!("workers = {cores}");
        println!(
            "memory = {memory:.3e} # {KEPT} products of two tensors of {} MiB, each kept",
            ACTIVATION >> 18
        );
        println!("update = {update:.3e} # AdamW on {} MiB of parameters", BLOCK >> 18);
        println!("launch = {launch:.3e} # product of 16 elements with its node of the graph");
        println!("message = {message:.3e} # all-reduce of one element");
        for (name, (products, attention)) in [("float32", float32), ("bfloat16", bfloat16)] {
            println!("\n[cluster.cpu{cores}.{name}]");
            println!("peak = {products:.4e} # product of {rows} x {inputs} x {outputs}");
            println!("products = 1.0 # it is what was measured");
            println!("attention = {:.3} # {ATTENTION:?}", attention / products);
        }
        println!("\n[cluster.cpu{cores}.links.memory]");
        println!("pass = {pass:.3e} # all-reduce of {} MiB", BLOCK >> 18);
    }
    collective::finish(world).expect("a sound world");
}
