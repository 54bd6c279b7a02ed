//! A program that does everything right passes, with right results, at every number of ranks.

use std::ffi::c_void;

use super::rank::*;
use crate::nccl::*;

const COUNT: usize = 1000;

fn values(rank: usize) -> Vec<f32> {
    (0..COUNT).map(|place| (rank * 7 + place) as f32 * 0.1).collect()
}

/// The pairwise tree, written out.
fn summed(ranks: usize) -> Vec<f32> {
    let [a, b, c, d] = [0, 1, 2, 3].map(values);
    let at = |place: usize| match ranks {
        1 => a[place],
        2 => a[place] + b[place],
        3 => (a[place] + b[place]) + c[place],
        _ => (a[place] + b[place]) + (c[place] + d[place]),
    };
    (0..COUNT).map(at).collect()
}

#[test]
fn a_sound_program_passes_at_one_to_four_ranks() {
    for ranks in 1..=4 {
        expect_success(&launch(ranks, "sound::all_operations", &[]));
    }
}

#[test]
fn a_sound_program_passes_with_delays_and_shuffled_streams() {
    for seed in ["1", "2", "3"] {
        expect_success(&launch(
            3,
            "sound::all_operations",
            &[("NCCL_DOUBLE_SHUFFLE", seed), ("NCCL_DOUBLE_DELAY_MS", "2")],
        ));
    }
}

pub fn all_operations() {
    let rank = Rank::start();
    let (own, ranks) = (rank.rank, rank.ranks);
    let mut both = (0, 0);
    unsafe { ncclCommCount(rank.world, &mut both.0) };
    unsafe { ncclCommUserRank(rank.world, &mut both.1) };
    assert_eq!(both, (ranks as i32, own as i32));

    let mut in_place = values(own);
    wait(rank.start_all_reduce(&mut in_place));
    assert_eq!(in_place, summed(ranks));
    in_groups(&rank);
    slices_in_place(&rank);
    from_each_root(&rank);

    let second = Rank { world: rank.communicator(1), stream: new_stream(), ..rank };
    let mut again = values(own);
    wait(second.start_all_reduce(&mut again));
    assert_eq!(again, summed(ranks));
    second.end();
    rank.end();
}

/// Three operations out of place that travel as one.
fn in_groups(rank: &Rank) {
    let (own, ranks) = (rank.rank, rank.ranks);
    let one = COUNT / ranks;
    let sent = values(own);
    let (mut reduced, mut part, mut all) =
        (vec![0.0; COUNT], vec![0.0; one], vec![0.0; COUNT * ranks]);
    let from = sent.as_ptr().cast::<c_void>();
    rank.computed();
    ncclGroupStart();
    assert_eq!(
        ncclAllReduce(from, reduced.as_mut_ptr().cast(), COUNT, F32, SUM, rank.world, rank.stream),
        0
    );
    assert_eq!(
        ncclReduceScatter(from, part.as_mut_ptr().cast(), one, F32, SUM, rank.world, rank.stream),
        0
    );
    assert_eq!(
        ncclAllGather(from, all.as_mut_ptr().cast(), COUNT, F32, rank.world, rank.stream),
        0
    );
    assert_eq!(ncclGroupEnd(), IN_PROGRESS);
    assert_eq!(settle(rank.world), 0);
    wait(rank.end_of_stream());
    assert_eq!(reduced, summed(ranks));
    assert_eq!(part, summed(ranks)[own * one..][..one]);
    assert_eq!(all, (0..ranks).flat_map(values).collect::<Vec<_>>());
}

fn slices_in_place(rank: &Rank) {
    let (own, ranks) = (rank.rank, rank.ranks);
    let one = COUNT / ranks;
    let mut full = values(own);
    let start = full.as_mut_ptr();
    let slice = start.wrapping_add(own * one).cast::<c_void>();
    rank.computed();
    ncclReduceScatter(start.cast(), slice, one, F32, SUM, rank.world, rank.stream);
    assert_eq!(settle(rank.world), 0);
    wait(rank.end_of_stream());
    assert_eq!(full[own * one..][..one], summed(ranks)[own * one..][..one]);
    rank.computed();
    ncclAllGather(slice, start.cast(), one, F32, rank.world, rank.stream);
    assert_eq!(settle(rank.world), 0);
    wait(rank.end_of_stream());
    assert_eq!(full[..one * ranks], summed(ranks)[..one * ranks]);
}

fn from_each_root(rank: &Rank) {
    for root in 0..rank.ranks {
        let mut buffer = values(rank.rank);
        let start = buffer.as_mut_ptr().cast::<c_void>();
        rank.computed();
        ncclBroadcast(start, start, COUNT, F32, root as i32, rank.world, rank.stream);
        assert_eq!(settle(rank.world), 0);
        wait(rank.end_of_stream());
        assert_eq!(buffer, values(root));
    }
}

#[test]
fn two_hundred_megabytes_arrive() {
    expect_success(&launch(2, "sound::a_large_buffer", &[]));
}

pub fn a_large_buffer() {
    let rank = Rank::start();
    let count = 50 << 20;
    let mut large: Vec<f32> = (0..count).map(|place| (place % 1009) as f32).collect();
    wait(rank.start_all_reduce(&mut large));
    assert!(large.iter().enumerate().all(|(place, value)| *value == 2.0 * (place % 1009) as f32));
    rank.end();
}

#[test]
fn an_output_holds_no_number_before_the_compute_stream_has_waited() {
    expect_success(&launch(2, "sound::an_early_reader", &[]));
}

pub fn an_early_reader() {
    let rank = Rank::start();
    let mut buffer = values(rank.rank);
    let end = rank.start_all_reduce(&mut buffer);
    assert!(unsafe { buffer.as_ptr().read_volatile() }.is_nan());
    wait(end);
    assert_eq!(buffer, summed(2));
    rank.end();
}

#[test]
fn nothing_is_left_in_the_folder() {
    let folder = std::env::temp_dir().join(format!("nccl-double-test-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let ends =
        launch(2, "sound::a_maker_of_ids", &[("NCCL_DOUBLE_FOLDER", folder.to_str().unwrap())]);
    expect_success(&ends);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    std::fs::remove_dir(&folder).unwrap();
}

pub fn a_maker_of_ids() {
    let mut rank = Rank::without_communicator();
    let mut single = std::ptr::null_mut();
    assert_eq!(
        unsafe { ncclCommInitRankConfig(&mut single, 1, new_id(), 0, &mut config(0)) },
        IN_PROGRESS
    );
    assert_eq!(settle(single), 0);
    rank.world = single;
    wait(rank.start_all_reduce(&mut values(0)));
    rank.end();
}
