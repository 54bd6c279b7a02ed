//! Batches and micro-batches that cannot be.

use super::*;

#[test]
fn a_step_of_more_samples_than_can_be_counted_is_refused() {
    let most = i64::MAX;
    let config = |text: &str| RunConfig::read("test", text, &[]).expect("in range");
    let text = config(&format!("[train]\ngradient_accumulation_steps = {most}"))
        .global_batch(1)
        .expect_err("too many")
        .to_string();
    assert!(text.contains("train.gradient_accumulation_steps: 9223372036854775807 x 64 samples x 1 ranks are more than"), "{text}");
    for ranks in [1 << 60, usize::MAX] {
        assert_eq!(config("").global_batch(ranks).expect_err("too many").exit_code(), 50);
    }
    assert!(RunConfig::read("test", &format!("[train]\nglobal_batch_size = {most}"), &[]).is_err());
    let three = config("[train]\ngradient_accumulation_steps = 3");
    let found = three.micro_batches(Tokens { image: 9, text: 9 }, 8).expect("sound");
    assert_eq!(found, MicroBatches { count: 3, samples: 64 });
    assert_eq!(three.global_batch(8).expect("sound"), 3 * 64 * 8);
}

#[test]
fn a_listing_reads_back_however_long_it_has_become() {
    let path = std::env::temp_dir();
    let path = path.display();
    let dataset = |number: usize| format!("[[data.datasets]]\npath = \"{path}/{number}\"\n");
    let text: String = (0..500).map(dataset).collect();
    let config = RunConfig::read("test", &text, &[]).expect("short enough");
    let listing = config.to_toml();
    assert!(listing.len() > 100_000 && RunConfig::read("test", &listing, &[]).is_err());
    assert_eq!(RunConfig::read_listing("test", &listing).expect("our own"), config);
}

#[test]
fn a_run_without_an_end_has_a_number_of_steps_that_can_be_written() {
    let longest = format!("max_epochs = {MOST_STEPS}");
    let config = RunConfig::read("test", &longest, &[]).expect("in range");
    let steps = config.num_steps(u64::MAX);
    let config = RunConfig { max_steps: steps, ..config };
    assert!(config.to_toml().contains(&format!("max_steps = {MOST_STEPS}\n")), "{steps}");
    assert!(RunConfig::read("test", "max_epochs = 9223372036854775807", &[]).is_err());
}

#[test]
fn tokens_make_micro_batches_of_the_largest_divisor_that_fits() {
    let text = "[data]\nmicro_batch_tokens_per_gpu = 1000\n[train]\nglobal_batch_size = 24";
    let config = RunConfig::read("test", text, &[]).expect("sound");
    let found = |image: i64, ranks: usize| {
        let MicroBatches { count, samples } =
            config.micro_batches(Tokens { image, text: 10 }, ranks).expect("it divides");
        (count, samples)
    };
    assert_eq!([found(10, 1), found(90, 1), found(190, 1)], [(1, 24), (3, 8), (6, 4)]);
    assert_eq!([found(10, 2), found(90, 2), found(190, 2)], [(1, 12), (2, 6), (3, 4)]);
    assert_eq!(found(990, 1), (24, 1));
    assert_eq!(found(5000, 2), (12, 1), "at least one sample, whatever it takes");
    let error = config.global_batch(5).expect_err("it does not divide").to_string();
    assert!(
        error.contains("train.global_batch_size: 24 is no multiple of 5 ranks; nearest: 20 or 25"),
        "{error}"
    );
}

#[test]
fn a_number_of_tokens_is_refused_beside_what_contradicts_it() {
    let problems = |text: &str| {
        let text = format!("[data]\nmicro_batch_tokens_per_gpu = 1000\n{text}");
        RunConfig::read("test", &text, &[]).expect_err("refused").to_string()
    };
    assert!(
        problems("").contains(
            "train.global_batch_size: must be set beside data.micro_batch_tokens_per_gpu"
        )
    );
    let global = "[train]\nglobal_batch_size = 24\n";
    let size = problems(&format!("micro_batch_size_per_gpu = 8\n{global}"));
    assert!(
        size.contains(
            "data.micro_batch_tokens_per_gpu: 1000 tokens and micro_batch_size_per_gpu = 8"
        ),
        "{size}"
    );
    let steps = problems(&format!("{global}gradient_accumulation_steps = 2"));
    assert!(steps.contains("train.gradient_accumulation_steps: 2 stands beside"), "{steps}");
    let order =
        problems(&format!("{global}[parallel]\ndeterministic = true\nseed_scope = \"sample\""));
    assert!(order.contains("parallel.deterministic: needs micro-batches of one size"), "{order}");
}
