//! Every rule fires: programs that break one each, and the sentence that they end with.

use std::ffi::c_void;
use std::ptr::null_mut;

use super::kernels::{kernel, run};
use super::programs::Program;
use super::rank::*;
use crate::cuda::*;
use crate::nccl::*;

/// A test that `$program`, run once a rank, ends with `$sentence`; `$PROGRAMS` lists the programs.
macro_rules! breaks {
    ($PROGRAMS:ident: $($name:ident, $ranks:expr, $sentence:expr, $program:expr;)*) => {
        $(
            mod $name {
                use super::*;

                pub const PROGRAM: Program =
                    (concat!("broken::", stringify!($name)), $program);

                #[test]
                fn is_told() {
                    expect_broken(&launch($ranks, PROGRAM.0, &[]), $sentence);
                }
            }
        )*

        pub const $PROGRAMS: &[Program] = &[$($name::PROGRAM),*];
    };
}

// What ranks must agree on.
breaks! { DISAGREE:
    ranks_that_differ_in_operation, 2, "ranks differ in operation 0 of a communicator: this is", || {
        let rank = Rank::start();
        let mut buffer = [1.0_f32; 8];
        let start = buffer.as_mut_ptr().cast::<c_void>();
        rank.computed();
        match rank.rank {
            0 => ncclAllReduce(start, start, 4, F32, SUM, rank.world, rank.stream),
            _ => ncclReduceScatter(start, start.wrapping_add(16), 4, F32, SUM, rank.world, rank.stream),
        };
        settle(rank.world);
        wait(rank.end_of_stream());
    };

    ranks_that_differ_in_count, 3, "all_reduce sum of 11 f32", || {
        let rank = Rank::start();
        wait(rank.start_all_reduce(&mut vec![1.0; 10 + rank.rank / 2]));
    };

    ranks_that_differ_in_type, 2, "all_reduce sum of 4 f64", || two_ways(|rank| (4, 7 + rank as u32, SUM, 0));

    ranks_that_differ_in_reduction, 2, "all_reduce max of 4 f32", || two_ways(|rank| (4, F32, 2 * rank as u32, 0));

    ranks_that_differ_in_root, 2, "broadcast from rank 1 of 4 f32", || {
        let rank = Rank::start();
        let mut buffer = [1.0_f32; 4];
        let start = buffer.as_mut_ptr().cast::<c_void>();
        rank.computed();
        ncclBroadcast(start, start, 4, F32, rank.rank as i32, rank.world, rank.stream);
        settle(rank.world);
        wait(rank.end_of_stream());
    };

    ranks_that_differ_in_order, 2, "ranks differ in operation 0 of a communicator: this is all_reduce sum of", || {
        let rank = Rank::start();
        let (mut short, mut long) = ([1.0; 4], [1.0; 8]);
        let both = if rank.rank == 0 { [&mut short[..], &mut long[..]] } else { [&mut long[..], &mut short[..]] };
        both.into_iter().for_each(|buffer| wait(rank.start_all_reduce(buffer)));
    };

    ranks_that_differ_in_groups, 2, "(call 1 of a group of 2)", || two_ways(|rank| (4, F32, SUM, rank));

    ranks_that_differ_in_the_order_of_communicators, 2, "ranks differ in the order of communicators", || {
        let rank = Rank::start();
        let second = Rank { world: rank.communicator(1), ..rank };
        let (mut one, mut two) = ([1.0; 4], [1.0; 4]);
        let order = if rank.rank == 0 { [&rank, &second] } else { [&second, &rank] };
        let ends = [order[0].start_all_reduce(&mut one), order[1].start_all_reduce(&mut two)];
        ends.into_iter().for_each(wait);
    };

    ranks_that_wait_in_different_communicators, 2, "ranks differ in communicator: this rank waits for operation 0", || {
        let rank = Rank::start();
        let second = Rank { world: rank.communicator(1), ..rank };
        wait([&rank, &second][rank.rank].start_all_reduce(&mut [1.0; 4]));
    };

    ranks_that_differ_in_the_number_of_operations, 2, "rank 1 ended the communicator before operation 0", || {
        let rank = Rank::start();
        match rank.rank {
            0 => wait(rank.start_all_reduce(&mut [1.0; 4])),
            _ => rank.end(),
        }
    };

    ranks_that_differ_in_the_size_of_the_communicator, 2, "ranks differ in the size of a communicator", || {
        let mut rank = Rank::without_communicator();
        rank.ranks += rank.rank;
        rank.communicator(0);
    };

    two_processes_of_one_rank, 2, "rank 0 of a communicator of 2 is taken by another process", || {
        let mut rank = Rank::without_communicator();
        rank.rank = 0;
        rank.communicator(0);
    };
}

/// An all-reduce that is the arguments' on every rank: count, type, reduction, and how many more
/// come in one group with it.
fn two_ways(arguments: fn(usize) -> (usize, u32, u32, usize)) {
    let rank = Rank::start();
    let (count, kind, op, more) = arguments(rank.rank);
    let mut buffers = [[1.0_f64; 8]; 2];
    rank.computed();
    ncclGroupStart();
    for buffer in &mut buffers[..=more] {
        let start = buffer.as_mut_ptr().cast::<c_void>();
        ncclAllReduce(start, start, count, kind, op, rank.world, rank.stream);
    }
    ncclGroupEnd();
    settle(rank.world);
    wait(rank.end_of_stream());
}

// Memory, and the events that guard it.
breaks! { MISUSE_MEMORY:
    a_launch_that_waits_for_nothing, 1, "stream 1 has not waited for an event of the compute stream since its last launch", || {
        let rank = Rank::start();
        rank.all_reduce(&mut [1.0; 4]);
    };

    a_second_launch_on_one_event, 1, "stream 1 has not waited for an event of the compute stream since its last launch", || {
        let rank = Rank::start();
        let (computed, mut buffer) = (new_event(), [1.0; 4]);
        cuEventRecord(computed, null_mut());
        for _ in 0..2 {
            cuStreamWaitEvent(rank.stream, computed, 0);
            rank.all_reduce(&mut buffer);
            settle(rank.world);
            wait(rank.end_of_stream());
        }
    };

    a_launch_that_waits_for_another_side_stream_only, 1, "stream 1 has not waited for an event of the compute stream", || {
        let rank = Rank::start();
        let (other, event) = (new_stream(), new_event());
        cuEventRecord(event, other);
        cuStreamWaitEvent(rank.stream, event, 0);
        rank.all_reduce(&mut [1.0; 4]);
    };

    a_wait_for_an_event_that_was_never_recorded, 1, "event 1 was never recorded, so the wait waits for nothing", || {
        let rank = Rank::start();
        cuStreamWaitEvent(rank.stream, new_event(), 0);
    };

    a_launch_on_the_compute_stream, 1, "all_reduce: it was given the compute stream", || {
        let rank = Rank::start();
        Rank { stream: null_mut(), ..rank }.all_reduce(&mut [1.0; 4]);
    };

    an_input_written_meanwhile, 2, "operation 0 (all_reduce sum of 4 f32): its input was written before it was done", || {
        let rank = Rank::start();
        let mut memory = [[1.0_f32; 4]; 2];
        let end = start_out_of_place(&rank, memory.as_mut_ptr().cast());
        memory[0][3] = 2.0;
        std::hint::black_box(&memory);
        wait(end);
    };

    an_output_written_meanwhile, 2, "operation 0 (all_reduce sum of 4 f32): its output was written before it was done", || {
        let rank = Rank::start();
        let mut memory = [[1.0_f32; 4]; 2];
        let end = start_out_of_place(&rank, memory.as_mut_ptr().cast());
        memory[1][0] = 2.0;
        std::hint::black_box(&memory);
        wait(end);
    };

    a_buffer_reduced_in_place_and_written_meanwhile, 2, "its output was written before it was done", || {
        let rank = Rank::start();
        let mut memory = vec![1.0; 100_000];
        let end = rank.start_all_reduce(&mut memory);
        memory[99_999] = 3.0;
        std::hint::black_box(&memory);
        wait(end);
    };

    an_input_freed_meanwhile, 2, "its input was freed before it was done", || {
        let rank = Rank::start();
        let (pages, mut output) = (Pages::new(), [0.0_f32; 4]);
        let end = start_all_reduce_between(&rank, pages.start, output.as_mut_ptr().cast());
        drop(pages);
        wait(end);
    };

    an_output_freed_meanwhile, 2, "its output was freed before it was done", || {
        let rank = Rank::start();
        let (pages, mut input) = (Pages::new(), [0.0_f32; 4]);
        let end = start_all_reduce_between(&rank, input.as_mut_ptr().cast(), pages.start);
        drop(pages);
        wait(end);
    };

    a_heap_block_freed_and_used_again_meanwhile, 2, "before it was done", || {
        let rank = Rank::start();
        let mut block = vec![1.0; 4000];
        let end = rank.start_all_reduce(&mut block);
        drop(block);
        std::hint::black_box(vec![5.0_f32; 4000]);
        wait(end);
    };

    an_input_that_is_not_memory, 1, "its input is not memory of this process", || {
        let rank = Rank::start();
        start_all_reduce_between(&rank, made_up(), [0.0_f32; 4].as_mut_ptr().cast());
    };

    an_output_that_is_not_memory, 1, "its output is not writable memory of this process", || {
        let rank = Rank::start();
        start_all_reduce_between(&rank, [0.0_f32; 4].as_mut_ptr().cast(), made_up());
    };

    operations_under_way_that_overlap, 1, "operation 1 (all_reduce sum of 4 f32) uses memory that operation 0 (all_reduce sum of 4 f32) still uses", || {
        let rank = Rank::start();
        let mut buffer = [1.0; 4];
        rank.start_all_reduce(&mut buffer);
        rank.start_all_reduce(&mut buffer);
    };

    input_and_output_that_overlap, 1, "input and output overlap, and not as NCCL's in-place operation has it", || {
        let rank = Rank::start();
        let mut buffer = [1.0_f32; 8];
        let start = buffer.as_mut_ptr();
        start_all_reduce_between(&rank, start.cast(), start.wrapping_add(2).cast());
    };
}

fn start_out_of_place(rank: &Rank, memory: *mut c_void) -> *mut c_void {
    start_all_reduce_between(rank, memory, memory.wrapping_add(16))
}

/// Of four numbers.
fn start_all_reduce_between(rank: &Rank, send: *mut c_void, receive: *mut c_void) -> *mut c_void {
    rank.computed();
    ncclAllReduce(send, receive, 4, F32, SUM, rank.world, rank.stream);
    settle(rank.world);
    rank.end_of_stream()
}

/// A page that goes back to the system when it is dropped.
struct Pages {
    start: *mut c_void,
}

impl Pages {
    fn new() -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at a place that the kernel chooses.
        let start = unsafe {
            libc::mmap(null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        Pages { start }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`; the double expects that memory may go.
        assert_eq!(unsafe { libc::munmap(self.start, 4096) }, 0);
    }
}

// Calls that block, and calls before a poll.
breaks! { BLOCK:
    a_blocking_communicator, 1, "with blocking = 1 the communicator blocks the host", || init_with(config(1));

    a_communicator_of_the_default_configuration, 1, "with blocking = -2147483648 the communicator blocks the host", || init_with(config(i32::MIN));

    a_configuration_of_zeros, 1, "the configuration was not initialized", || init_with(Config { magic: 0, ..config(0) });

    a_configuration_of_another_version, 1, "the configuration is one of version 22703, the library 22907", || init_with(Config { version: 22_703, ..config(0) });

    a_configuration_with_zeros, 1, "minCTAs = 0 is neither positive nor undefined", || init_with(Config { min_ctas: 0, ..config(0) });

    a_communicator_without_a_configuration, 1, "without a configuration the communicator blocks the host", || {
        let rank = Rank::without_communicator();
        unsafe { ncclCommInitRankConfig(&mut null_mut(), 1, rank.id(0), 0, null_mut()) };
    };

    a_communicator_without_a_gpu, 1, "this thread has no current context", || {
        let rank = Rank::without_communicator();
        cuCtxSetCurrent(null_mut());
        rank.communicator(0);
    };

    a_host_that_waits_for_a_stream, 1, "cuStreamSynchronize blocks the host", || _ = cuStreamSynchronize();

    a_host_that_waits_for_an_event, 1, "cuEventSynchronize blocks the host", || _ = cuEventSynchronize();

    a_host_that_waits_for_the_device, 1, "cuCtxSynchronize blocks the host", || _ = cuCtxSynchronize();

    a_function_that_the_double_lacks, 1, "the double has no ncclCommSplit", || _ = ncclCommSplit();

    a_communicator_used_before_it_is_there, 1, "all_reduce: communicator 1 is used while ncclInProgress", || {
        let mut rank = Rank::without_communicator();
        unsafe { ncclCommInitRankConfig(&mut rank.world, 1, rank.id(0), 0, &mut config(0)) };
        rank.computed();
        rank.all_reduce(&mut [1.0; 4]);
    };

    a_communicator_used_while_a_launch_is_in_progress, 1, "all_reduce: communicator 1 is used while ncclInProgress", || {
        let rank = Rank::start();
        rank.computed();
        rank.all_reduce(&mut [1.0; 4]);
        assert_eq!(poll(rank.world), IN_PROGRESS);
        rank.all_reduce(&mut [1.0; 4]);
    };

    an_event_recorded_while_a_launch_is_in_progress, 1, "cuEventRecord: the last launch on stream 1 is in progress; poll communicator 1", || {
        let rank = Rank::start();
        rank.computed();
        rank.all_reduce(&mut [1.0; 4]);
        rank.end_of_stream();
    };

    an_event_recorded_inside_of_a_group, 1, "cuEventRecord: a group with calls on stream 1 is still open", || {
        let rank = Rank::start();
        rank.computed();
        ncclGroupStart();
        rank.all_reduce(&mut [1.0; 4]);
        rank.end_of_stream();
    };

    a_communicator_destroyed_without_being_finalized, 1, "communicator 1 was not finalized before, so the call blocks the host", || {
        ncclCommDestroy(Rank::start().world);
    };

    a_communicator_destroyed_while_it_is_being_finalized, 1, "communicator 1 is being finalized; poll", || {
        let rank = Rank::start();
        ncclCommFinalize(rank.world);
        ncclCommDestroy(rank.world);
    };

    a_stream_that_takes_turns_with_the_compute_stream, 1, "cuStreamCreate: with flags 0 the stream takes turns with the compute stream", || {
        Rank::without_communicator();
        unsafe { cuStreamCreate(&mut null_mut(), 0) };
    };

    an_event_whose_wait_blocks, 1, "cuEventCreate: flags 1 are neither 0 nor 2", || {
        Rank::without_communicator();
        unsafe { cuEventCreate(&mut null_mut(), 1) };
    };
}

fn init_with(mut config: Config) {
    let rank = Rank::without_communicator();
    unsafe { ncclCommInitRankConfig(&mut null_mut(), 1, rank.id(0), 0, &mut config) };
}

// What must end, and must not be used afterwards.
breaks! { OUTLIVE:
    an_operation_that_nobody_waits_for, 2, "operation 0 (all_reduce sum of 4 f32) on stream 1 was never waited for by the compute stream", || {
        let rank = Rank::start();
        let (mut first, mut second) = ([1.0; 4], [1.0; 4]);
        cuEventDestroy_v2(rank.start_all_reduce(&mut first));
        rank.start_all_reduce(&mut second);
    };

    a_stream_destroyed_before_its_operation_is_waited_for, 1, "operation 0 (all_reduce sum of 4 f32) on stream 1 was never waited for", || {
        let rank = Rank::start();
        rank.start_all_reduce(&mut [1.0; 4]);
        cuStreamDestroy_v2(rank.stream);
    };

    a_stream_destroyed_with_work, 2, "cuStreamDestroy: stream 1 has work that is not done", || {
        let rank = Rank::start();
        if rank.rank == 0 {
            rank.start_all_reduce(&mut [1.0; 4]);
            cuStreamDestroy_v2(rank.stream);
        }
        finalize(rank.world);
    };

    a_group_that_stays_open, 1, "at the process's end a group is open", || {
        let rank = Rank::start();
        rank.end();
        ncclGroupStart();
    };

    a_group_that_ends_twice, 1, "ncclGroupEnd: no group is open on this thread", || {
        Rank::start();
        ncclGroupStart();
        ncclGroupEnd();
        ncclGroupEnd();
    };

    an_event_that_leaks, 1, "at the process's end event 1 was not destroyed", || {
        let rank = Rank::start();
        new_event();
        rank.end();
    };

    a_stream_that_leaks, 1, "at the process's end stream 1 was not destroyed", || finalize(Rank::start().world);

    a_communicator_that_leaks, 1, "at the process's end communicator 1 was not destroyed", || {
        cuStreamDestroy_v2(Rank::start().stream);
    };

    an_event_destroyed_twice, 1, "cuEventDestroy: event 1 is used after its end", || {
        Rank::without_communicator();
        let event = new_event();
        cuEventDestroy_v2(event);
        cuEventDestroy_v2(event);
    };

    a_stream_used_after_its_end, 1, "cuStreamQuery: stream 1 is used after its end", || {
        let rank = Rank::without_communicator();
        cuStreamDestroy_v2(rank.stream);
        cuStreamQuery(rank.stream);
    };

    a_communicator_used_after_its_abort, 1, "all_reduce: communicator 1 is used after its end", || {
        let rank = Rank::start();
        ncclCommAbort(rank.world);
        rank.all_reduce(&mut [1.0; 4]);
    };

    a_communicator_aborted_twice, 1, "ncclCommAbort: communicator 1 is used after its end", || {
        let rank = Rank::start();
        ncclCommAbort(rank.world);
        ncclCommAbort(rank.world);
    };

    a_communicator_used_after_it_was_finalized, 1, "all_reduce: communicator 1 is used after it was finalized", || {
        let rank = Rank::start();
        ncclCommFinalize(rank.world);
        settle(rank.world);
        rank.all_reduce(&mut [1.0; 4]);
    };

    a_handle_that_nobody_made, 1, "cuEventQuery: 0x1230 is no event", || {
        Rank::without_communicator();
        cuEventQuery(made_up());
    };

    a_communicator_given_as_a_stream, 1, "is no stream", || {
        let rank = Rank::start();
        cuStreamQuery(rank.world);
    };

    a_unique_id_that_nobody_made, 1, "this unique id is not from ncclGetUniqueId", || {
        Rank::without_communicator();
        unsafe { ncclCommInitRankConfig(&mut null_mut(), 1, UniqueId([0; 128]), 0, &mut config(0)) };
    };

    a_kind_that_the_double_lacks, 1, "all_reduce: the double carries no type 6", || two_ways(|_| (4, 6, SUM, 0));
}

// Kernels.
breaks! { LAUNCH_WRONGLY:
    a_kernel_beside_the_compute_stream, 1, "cuLaunchKernel: add runs beside the compute stream", || {
        let rank = Rank::start();
        run(kernel().1, [1, 32, 0], rank.stream, [null_mut(); 3]);
    };

    a_kernel_of_another_gpu, 1, "cuLaunchKernel: add was loaded for GPU 0, and Some(1) is current", || {
        Rank::start();
        let (_, add) = kernel();
        let mut context = null_mut();
        unsafe { cuDevicePrimaryCtxRetain(&mut context, 1) };
        cuCtxSetCurrent(context);
        run(add, [1, 32, 0], null_mut(), [null_mut(); 3]);
    };

    an_argument_that_cannot_be_read, 1, "cuLaunchKernel: argument 0 of add is not readable for 8 bytes", || {
        Rank::start();
        run(kernel().1, [1, 32, 0], null_mut(), [null_mut(); 3]);
    };

    a_kernel_without_a_place_to_run, 1, "add cannot run here: NCCL_DOUBLE_KERNELS names no library", || {
        Rank::start();
        let mut numbers = [0u64; 2];
        run(kernel().1, [1, 32, 0], null_mut(), [numbers.as_mut_ptr().cast(); 3]);
    };

    a_kernel_used_after_its_modules_end, 1, "cuLaunchKernel: function 1 is used after its end", || {
        Rank::start();
        let (module, add) = kernel();
        cuModuleUnload(module);
        run(add, [1, 32, 0], null_mut(), [null_mut(); 3]);
    };

    a_module_unloaded_twice, 1, "cuModuleUnload: module 1 is used after its end", || {
        Rank::start();
        let (module, _) = kernel();
        cuModuleUnload(module);
        cuModuleUnload(module);
    };

    a_module_that_leaks, 1, "at the process's end module 1 was not destroyed", || {
        let rank = Rank::start();
        kernel();
        rank.end();
    };
}
