//! One collective: what every rank must agree on, what its memory must look like meanwhile, and its
//! result.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use crate::board::{Board, write_file};
use crate::clock;
use crate::element::{Element, Reduction, reduce};
use crate::failure::fail;
use crate::memory::{self, BLOCK, POISON, Span, blocks};

/// Length of what stands before the payload of an operation's file.
const HEAD: usize = 8 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    AllReduce(Reduction),
    ReduceScatter(Reduction),
    AllGather,
    Broadcast { root: usize },
}

/// A call as the program made it, inside of a group or alone.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub collective: Collective,
    pub element: Element,
    pub count: usize,
    pub send: usize,
    pub receive: usize,
    pub communicator: usize,
    pub stream: usize,
}

impl Call {
    pub fn name(&self) -> &'static str {
        match self.collective {
            Collective::AllReduce(_) => "all_reduce",
            Collective::ReduceScatter(_) => "reduce_scatter",
            Collective::AllGather => "all_gather",
            Collective::Broadcast { .. } => "broadcast",
        }
    }

    /// What must be equal on all ranks.
    fn text(&self) -> String {
        let (count, element) = (self.count, self.element.name());
        match self.collective {
            Collective::AllReduce(reduction) | Collective::ReduceScatter(reduction) => {
                format!("{} {} of {count} {element}", self.name(), reduction.name())
            }
            Collective::AllGather => format!("all_gather of {count} {element}"),
            Collective::Broadcast { root } => {
                format!("broadcast from rank {root} of {count} {element}")
            }
        }
    }

    /// What this rank's part of the operation reads, and what it writes.
    fn spans(&self, rank: usize, num_ranks: usize) -> (Span, Span) {
        let one = self.count * self.element.bytes();
        let (send, receive) = match self.collective {
            Collective::AllReduce(_) => (one, one),
            Collective::ReduceScatter(_) => (one * num_ranks, one),
            Collective::AllGather => (one, one * num_ranks),
            Collective::Broadcast { root } if root == rank => (one, one),
            Collective::Broadcast { .. } => (0, one),
        };
        (Span::new(self.send, send), Span::new(self.receive, receive))
    }
}

/// An operation under way on one rank.
pub struct Operation {
    pub call: Call,
    /// Counted in its communicator.
    pub number: u64,
    text: String,
    send: Span,
    receive: Span,
    /// What must stay as it was sent; the rest of both spans holds poison.
    kept: Vec<Span>,
    /// Operations that this process had started on each of its communicators, by the hash of their
    /// ids.
    order: Vec<(u64, u64)>,
    /// Ranks whose file agrees with ours.
    agreed: Vec<bool>,
    /// When the last rank posted it.
    posted_at: u64,
    extra_delay: u64,
    /// A switch wants this rank never to take part.
    pub stuck: bool,
}

impl Operation {
    /// Checks a call of this rank by itself. `group` says where it stands among the calls that were
    /// launched together.
    pub fn new(
        call: Call,
        number: u64,
        board: &Board,
        group: (usize, usize),
        order: Vec<(u64, u64)>,
        extra_delay: u64,
    ) -> Self {
        let num_ranks = board.slots().len();
        let mut text = call.text();
        if group.1 > 1 {
            text += &format!(" (call {} of a group of {})", group.0 + 1, group.1);
        }
        let (send, receive) = call.spans(board.rank, num_ranks);
        let kept = kept(&call, board.rank, send, receive);
        let agreed = vec![false; num_ranks];
        Operation {
            call,
            number,
            text,
            send,
            receive,
            kept,
            order,
            agreed,
            posted_at: 0,
            extra_delay,
            stuck: false,
        }
    }

    pub fn describe(&self) -> String {
        format!("operation {} ({})", self.number, self.text)
    }

    /// Whether two operations under way may not overlap as they do.
    pub fn collides_with(&self, other: &Operation) -> bool {
        self.receive.overlaps(other.receive)
            || self.receive.overlaps(other.send)
            || self.send.overlaps(other.receive)
    }

    /// Lets the other ranks have this rank's part, and spoils what the operation will write.
    pub fn post(&self, board: &Board) {
        let mut head = Vec::with_capacity(HEAD);
        head.extend(clock::now().to_le_bytes());
        head.extend((self.text.len() as u64).to_le_bytes());
        head.extend(self.text.as_bytes());
        head.extend((self.order.len() as u64).to_le_bytes());
        head.extend(
            self.order
                .iter()
                .flat_map(|(id, count)| [id.to_le_bytes(), count.to_le_bytes()])
                .flatten(),
        );
        if head.len() > HEAD {
            fail("too many communicators for the double");
        }
        head.resize(HEAD, 0);
        if !write_file(&board.file(board.rank, self.number), &head, self.send) {
            fail(format!("{}: its input is not memory of this process", self.describe()));
        }
        for span in self.spoiled() {
            if !memory::poison(span) {
                fail(format!(
                    "{}: its output is not writable memory of this process",
                    self.describe()
                ));
            }
        }
        board.own().posted.store(self.number + 1, Ordering::Release);
    }

    fn spoiled(&self) -> Vec<Span> {
        let inside = self.kept.iter().find(|kept| kept.overlaps(self.receive));
        match inside {
            Some(kept) if kept.start <= self.receive.start && kept.end() >= self.receive.end() => {
                Vec::new()
            }
            Some(kept) => self.receive.around(*kept).into(),
            None => vec![self.receive],
        }
    }

    /// Takes note of what the other ranks have posted; when everyone has, the time at which data
    /// are there, if `started` is when the stream had come so far.
    pub fn arrival(&mut self, board: &Board, started: u64) -> Option<u64> {
        for rank in 0..self.agreed.len() {
            if !self.agreed[rank]
                && board.slots()[rank].posted.load(Ordering::Acquire) > self.number
            {
                self.compare(board, rank);
                self.agreed[rank] = true;
            }
        }
        let all = !self.stuck && self.agreed.iter().all(|agreed| *agreed);
        all.then(|| {
            self.posted_at.max(started)
                + crate::switches::switches().delay.as_nanos() as u64
                + self.extra_delay
        })
    }

    fn compare(&mut self, board: &Board, rank: usize) {
        let file = open(board, rank, self.number);
        let mut head = vec![0; HEAD];
        file.read_exact_at(&mut head, 0)
            .unwrap_or_else(|error| fail(format!("cannot read what rank {rank} posted: {error}")));
        let mut rest = &head[..];
        self.posted_at = self.posted_at.max(take(&mut rest));
        let length = take(&mut rest) as usize;
        let (text, mut rest) = rest.split_at(length);
        let theirs = String::from_utf8_lossy(text);
        if theirs != self.text {
            let number = self.number;
            fail(format!(
                "ranks differ in operation {number} of a communicator: this is {}, rank {rank} calls {theirs}",
                self.text
            ));
        }
        for _ in 0..take(&mut rest) {
            let (id, theirs) = (take(&mut rest), take(&mut rest));
            let ours = self.order.iter().find(|(own, _)| *own == id).map(|(_, count)| *count);
            if let Some(ours) = ours.filter(|ours| *ours != theirs) {
                let what = self.describe();
                fail(format!(
                    "ranks differ in the order of communicators: before {what} this rank started {ours} operations of another communicator, rank {rank} {theirs}"
                ));
            }
        }
    }

    /// Checks that nobody touched the memory since, and writes the result.
    pub fn finish(&self, board: &Board) {
        self.check_memory(board);
        let num_ranks = self.agreed.len();
        let one = self.call.count * self.call.element.bytes();
        let files: Vec<File> = (0..num_ranks).map(|rank| open(board, rank, self.number)).collect();
        let write = |bytes: &[u8], offset: usize| {
            if !memory::write(bytes, self.receive.start + offset) {
                fail(format!("{}: its output was freed before it was done", self.describe()));
            }
        };
        for (offset, length) in blocks(one) {
            let part = |rank: usize, at: usize| read_at(&files[rank], at + offset, length);
            match self.call.collective {
                Collective::AllReduce(reduction) | Collective::ReduceScatter(reduction) => {
                    let scattered = matches!(self.call.collective, Collective::ReduceScatter(_));
                    let at = if scattered { board.rank * one } else { 0 };
                    let mut parts: Vec<_> = (0..num_ranks).map(|rank| part(rank, at)).collect();
                    reduce(&mut parts, self.call.element, reduction);
                    write(&parts[0], offset);
                }
                Collective::AllGather => {
                    (0..num_ranks).for_each(|rank| write(&part(rank, 0), rank * one + offset))
                }
                Collective::Broadcast { root } => write(&part(root, 0), offset),
            }
        }
        board.own().finished.store(self.number + 1, Ordering::Release);
    }

    fn check_memory(&self, board: &Board) {
        let file = open(board, board.rank, self.number);
        let mut now = vec![0; BLOCK];
        for span in &self.kept {
            for (offset, length) in blocks(span.length) {
                self.check_read(memory::read(span.start + offset, &mut now[..length]), "input");
                if now[..length] != read_at(&file, span.start + offset - self.send.start, length) {
                    fail(format!("{}: its input was written before it was done", self.describe()));
                }
            }
        }
        for span in self.spoiled() {
            for (offset, length) in blocks(span.length) {
                self.check_read(memory::read(span.start + offset, &mut now[..length]), "output");
                if now[..length].iter().any(|byte| *byte != POISON) {
                    fail(format!("{}: its output was written before it was done", self.describe()));
                }
            }
        }
    }

    fn check_read(&self, mapped: bool, what: &str) {
        if !mapped {
            fail(format!("{}: its {what} was freed before it was done", self.describe()));
        }
    }
}

/// The parts of the input that the operation leaves alone. Where input and output overlap they must
/// do so as NCCL's in-place operations have it.
fn kept(call: &Call, rank: usize, send: Span, receive: Span) -> Vec<Span> {
    if !send.overlaps(receive) {
        return vec![send];
    }
    let one = call.count * call.element.bytes();
    match call.collective {
        Collective::AllReduce(_) if send == receive => Vec::new(),
        Collective::Broadcast { .. } if send == receive => vec![send],
        Collective::ReduceScatter(_) if receive.start == send.start + rank * one => {
            send.around(receive).into()
        }
        Collective::AllGather if send.start == receive.start + rank * one => vec![send],
        _ => fail(format!(
            "{}: input and output overlap, and not as NCCL's in-place operation has it",
            call.text()
        )),
    }
}

fn open(board: &Board, rank: usize, number: u64) -> File {
    let path = board.file(rank, number);
    File::open(&path)
        .unwrap_or_else(|error| fail(format!("cannot read {}: {error}", path.display())))
}

fn read_at(file: &File, offset: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let result = file.read_exact_at(&mut bytes, (HEAD + offset) as u64);
    result.unwrap_or_else(|error| fail(format!("cannot read what a rank posted: {error}")));
    bytes
}

fn take(rest: &mut &[u8]) -> u64 {
    let (number, tail) =
        rest.split_first_chunk::<8>().unwrap_or_else(|| fail("what a rank posted is cut off"));
    *rest = tail;
    u64::from_le_bytes(*number)
}
