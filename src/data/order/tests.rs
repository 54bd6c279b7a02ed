//! Orders of samples: who is reached, how often, and where.

use std::collections::BTreeSet;

use super::*;
use crate::rng::{Key, Purpose};

fn group(name: &str, ids: std::ops::Range<u64>) -> Group {
    Group { name: name.into(), sample_ids: ids.collect(), ..Group::default() }
}

/// 2 + 6 batches of 8, with 4 + 2 samples left out in each epoch.
fn order() -> Order {
    Order::new(&[group("wide", 0..20), group("square", 20..70)], 8, 5).expect("large enough groups")
}

#[test]
fn a_step_is_the_same_reached_directly_or_by_walking() {
    let walking = order();
    let walked: Vec<Vec<u64>> = (0..30).map(|step| walking.global_batch(step)).collect();
    for step in [29, 0, 8, 7, 15, 16] {
        assert_eq!(order().global_batch(step), walked[step as usize], "step {step}");
        assert_eq!(walking.global_batch(step), walked[step as usize], "step {step}, going back");
    }
}

#[test]
fn an_epoch_reaches_every_sample_at_most_once_and_others_are_left_out_each_time() {
    let order = order();
    assert_eq!((order.batches_per_epoch(), order.left_out_per_epoch()), (8, 6));
    assert_eq!((order.epoch_of(7), order.epoch_of(8)), (0, 1));
    let reached = |epoch: u64| {
        let ids: Vec<u64> =
            (epoch * 8..epoch * 8 + 8).flat_map(|step| order.global_batch(step)).collect();
        let distinct: BTreeSet<u64> = ids.iter().copied().collect();
        assert_eq!((ids.len(), distinct.len()), (64, 64), "epoch {epoch}");
        distinct
    };
    assert_ne!(reached(0), reached(1));
    let over_ten: BTreeSet<u64> = (0..10).flat_map(reached).collect();
    assert_eq!(over_ten.len(), 70, "no sample is left out for ever");
}

#[test]
fn b9_a_step_draws_from_one_group_and_the_groups_mix() {
    let order = order();
    let wide: Vec<bool> = (0..80)
        .map(|step| {
            let ids = order.global_batch(step);
            assert!(ids.iter().all(|id| *id < 20) || ids.iter().all(|id| *id >= 20), "{ids:?}");
            ids[0] < 20
        })
        .collect();
    assert_eq!(
        wide.iter().filter(|wide| **wide).count(),
        20,
        "two batches an epoch are of the small group"
    );
    let firsts: BTreeSet<bool> = wide.chunks(8).map(|epoch| epoch[0]).collect();
    assert_eq!(firsts.len(), 2, "epochs do not always begin with the same group");
}

#[test]
fn b8_blocks_leave_nothing_of_the_global_batch_out() {
    let order = order();
    let blocks: Vec<Vec<u64>> = (0..4).map(|block| order.block(3, block, 2)).collect();
    assert_eq!(blocks.concat(), order.global_batch(3));
}

#[test]
fn without_copies_there_are_none_to_count() {
    assert_eq!(order().copies(3, 1, 4), [0; 4]);
}

#[test]
fn another_seed_is_another_order() {
    let other = Order::new(&[group("wide", 0..20), group("square", 20..70)], 8, 6)
        .expect("large enough groups");
    assert_ne!(order().global_batch(0), other.global_batch(0));
}

#[test]
fn a_permutation_prefers_no_place() {
    let mut counts = [0; 5];
    for epoch in 0..5000 {
        let mut items = [0, 1, 2, 3, 4];
        permute(&mut items, Key::new(1, Purpose::Test).step(epoch));
        counts[items.iter().position(|item| *item == 0).expect("it is somewhere")] += 1;
    }
    // Binomial(5000, 0.2): 5 standard deviations are 141.
    assert!(counts.iter().all(|&count| (859..1141).contains(&count)), "{counts:?}");
}

#[test]
fn a_group_smaller_than_the_global_batch_is_named() {
    let error =
        Order::new(&[group("wide", 0..20), group("8x8", 20..25)], 8, 5).expect_err("five samples");
    assert_eq!(error.exit_code(), 40);
    assert!(
        error
            .to_string()
            .starts_with("resolution group 8x8: has 5 samples, fewer than the global batch of 8"),
        "{error}"
    );
}

/// A group of these stocks: first id, samples, repeats, folder.
fn stocked(name: &str, stock: &[(u64, u64, u64, usize)]) -> GroupPlan {
    let stock = stock.iter().map(|&(first, samples, repeats, folder)| Stock {
        ids: first..first + samples,
        repeats,
        folder,
    });
    GroupPlan::new(name, stock.collect())
}

fn over(groups: Vec<GroupPlan>, weights: &[f64], on_small_group: OnSmallGroup) -> Order {
    Order::over(groups, weights, 8, 5, on_small_group).expect("sound groups")
}

/// All samples of an epoch before the rest is left out, by their number of times.
fn times(order: &Order, epoch: u64) -> BTreeMap<u64, u64> {
    let mut times = BTreeMap::new();
    let groups = order.epoch(epoch);
    groups.ids().for_each(|id| *times.entry(id).or_insert(0) += 1);
    times
}

#[test]
fn repeats_take_each_sample_that_often_in_every_epoch() {
    let group = stocked("one", &[(0, 24, 1, 0), (24, 5, 3, 0), (29, 4, 10, 1)]);
    let order = over(vec![group], &[0.0, 0.0], OnSmallGroup::Stop);
    assert_eq!(order.samples_per_epoch(), 24 + 15 + 40);
    assert_eq!((order.batches_per_epoch(), order.left_out_per_epoch()), (9, 7));
    assert_eq!((order.samples_of(0), order.samples_of(1)), (39, 40));
    for epoch in 0..3 {
        let times = times(&order, epoch);
        let expected = |id: &u64| {
            [(24, 1), (29, 3), (33, 10)].iter().find(|(end, _)| id < end).expect("known").1
        };
        assert_eq!(times.len(), 33);
        assert!(times.iter().all(|(id, count)| *count == expected(id)), "{times:?}");
    }
}

#[test]
fn weights_share_an_epoch_exactly_and_reach_everybody_over_epochs() {
    // 100 samples of the first dataset are three fifths; 35 of the second take 67 places.
    let groups = vec![
        stocked("mixed", &[(0, 40, 1, 0), (100, 20, 1, 1)]),
        stocked("wide", &[(40, 60, 1, 0), (120, 15, 1, 1)]),
    ];
    let order = over(groups, &[3.0, 2.0], OnSmallGroup::Stop);
    assert_eq!((order.samples_of(0), order.samples_of(1)), (100, 67));
    let mut once_more: BTreeMap<u64, u64> = BTreeMap::new();
    for epoch in 0..30 {
        let times = times(&order, epoch);
        let of = |ids: std::ops::Range<u64>| times.range(ids).map(|(_, count)| count).sum::<u64>();
        assert_eq!((of(0..100), of(100..135)), (100, 67), "epoch {epoch}");
        assert!((0..100).all(|id| times[&id] == 1), "epoch {epoch}");
        assert!((100..135).all(|id| (1..=2).contains(&times[&id])), "epoch {epoch}");
        let more = times.range(100..).filter(|(_, count)| **count == 2);
        more.for_each(|(id, _)| *once_more.entry(*id).or_insert(0) += 1);
    }
    // 32 of 35 are taken twice in each epoch: all of them 27 or 28 times in thirty.
    assert_eq!(once_more.len(), 35);
    let (least, most) = (once_more.values().min(), once_more.values().max());
    assert!(most.expect("some") - least.expect("some") <= 2, "{once_more:?}");
}

#[test]
fn copies_of_a_sample_are_spread_over_the_epoch() {
    let group = stocked("one", &[(0, 160, 1, 0), (160, 16, 10, 1)]);
    let order = over(vec![group], &[0.0, 0.0], OnSmallGroup::Stop);
    assert_eq!(order.batches_per_epoch(), 40);
    let mut places: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    let mut of_first = Vec::new();
    for step in 0..40 {
        let ids = order.global_batch(step);
        of_first.push(ids.iter().filter(|id| **id < 160).count());
        ids.iter().for_each(|id| places.entry(*id).or_default().push(step));
    }
    // A copy in each round, a tenth of the epoch: about four steps.
    for (id, steps) in places.range(160..) {
        let distances = steps.windows(3).map(|three| three[2] - three[0]);
        assert!(distances.min() >= Some(2), "sample {id} in steps {steps:?}");
        assert!(steps[0] < 8 && steps[9] >= 32, "sample {id} in steps {steps:?}");
    }
    // The others do not crowd where there are no copies.
    let tenths: Vec<usize> = of_first.chunks(4).map(|steps| steps.iter().sum()).collect();
    assert!(tenths.iter().all(|count| (4..=28).contains(count)), "{tenths:?}");
}

#[test]
fn a_walk_through_copies_is_a_pure_function_of_the_step() {
    let groups =
        || vec![stocked("a", &[(0, 30, 3, 0), (30, 7, 1, 1)]), stocked("b", &[(37, 9, 2, 1)])];
    let make = || over(groups(), &[1.0, 1.0], OnSmallGroup::Stop);
    let walking = make();
    let walked: Vec<Vec<u64>> = (0..100).map(|step| walking.global_batch(step)).collect();
    for step in [99, 0, 50, 51, 23] {
        assert_eq!(make().global_batch(step), walked[step as usize], "step {step}");
        let blocks: Vec<u64> = (0..4).flat_map(|block| make().block(step, block, 2)).collect();
        assert_eq!(blocks, walked[step as usize], "step {step}");
    }
}

#[test]
fn a_small_group_stops_is_left_out_or_is_gone_round_again() {
    let groups = || {
        let tiny = stocked("tiny", &[(20, 5, 1, 0), (25, 1, 1, 1)]);
        vec![stocked("wide", &[(0, 20, 1, 0)]), tiny, stocked("none", &[(26, 1, 2, 1)])]
    };
    let error = Order::over(groups(), &[0.0, 0.0], 8, 5, OnSmallGroup::Stop).expect_err("small");
    let text = error.to_string();
    assert!(
        text.starts_with("resolution group tiny: has 6 samples, fewer than the global batch of 8"),
        "{text}"
    );
    assert!(text.contains("another group is too small as well"), "{text}");

    let dropped = over(groups(), &[0.0, 0.0], OnSmallGroup::Drop);
    assert_eq!((dropped.batches_per_epoch(), dropped.left_out_per_epoch()), (2, 4));
    assert!((0..20).all(|step| dropped.global_batch(step).iter().all(|id| *id < 20)));
    assert_eq!([0, 1, 2].map(|group| dropped.takes(group)), [true, false, false]);
    assert_eq!(
        dropped.small_groups().expect("two"),
        "data.on_small_group leaves out 2 of 3 resolution groups, of 8 samples, which are smaller than \
         the global batch of 8: tiny (6), none (2)"
    );

    let filled = over(groups(), &[0.0, 0.0], OnSmallGroup::Repeat);
    assert_eq!((filled.batches_per_epoch(), filled.samples_per_epoch()), (4, 36));
    assert_eq!((filled.samples_of(0), filled.samples_of(1)), (27, 9));
    for epoch in 0..4 {
        let times = times(&filled, epoch);
        assert!((20..26).all(|id| (1..=2).contains(&times[&id])), "{times:?}");
        assert_eq!(times[&26], 8);
    }
    assert!(filled.small_groups().expect("two").contains("repeats the samples of 2 of 3"));

    let none =
        Order::over(vec![stocked("tiny", &[(0, 5, 1, 0)])], &[0.0], 8, 5, OnSmallGroup::Drop);
    assert!(none.expect_err("nothing is left").to_string().contains("every one is smaller"));
    assert!(
        over(vec![stocked("one", &[(0, 4, 2, 0)])], &[0.0], OnSmallGroup::Stop)
            .small_groups()
            .is_none()
    );
}

#[test]
fn copies_in_one_global_batch_are_counted_whatever_the_blocks() {
    let order = over(vec![stocked("one", &[(0, 3, 1, 0)])], &[0.0], OnSmallGroup::Repeat);
    for step in 0..5 {
        let ids = order.global_batch(step);
        let expected: Vec<u64> = (0..8)
            .map(|place| ids[..place].iter().filter(|id| **id == ids[place]).count() as u64)
            .collect();
        assert!(expected.iter().max() >= Some(&2), "{ids:?}");
        for size in [1, 2, 4, 8] {
            let found: Vec<u64> =
                (0..8 / size).flat_map(|block| order.copies(step, block, size)).collect();
            assert_eq!(found, expected, "step {step} in blocks of {size}");
        }
    }
}

#[test]
fn an_epoch_that_would_not_fit_into_memory_is_refused() {
    let group = stocked("one", &[(0, 1000, 1 << 20, 0)]);
    let error = Order::over(vec![group], &[0.0], 8, 5, OnSmallGroup::Stop).expect_err("long");
    assert!(error.to_string().contains("make an epoch of 1048576000 samples"), "{error}");
    let groups = vec![stocked("one", &[(0, 1000, 1, 0), (1000, 1000, 1, 1)])];
    let error = Order::over(groups, &[1e6, 1e-3], 8, 5, OnSmallGroup::Stop).expect_err("long");
    assert_eq!(error.exit_code(), 50);
}
