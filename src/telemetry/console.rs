//! Writes log lines and the progress bar to one terminal.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

use crate::files::durable::FirstFailure;

/// Width of a bar that goes through a pipe, whose terminal cannot be queried (mpirun forwards its
/// ranks' stderr through one).
const PIPE_COLUMNS: u16 = 100;

/// Standard error, or its substitute in a test.
pub(super) struct Console {
    out: Mutex<Out>,
    bar: Mutex<Option<ProgressBar>>,
    pub is_terminal: bool,
}

struct Out {
    writer: Box<dyn Write + Send>,
    failure: FirstFailure,
}

impl Console {
    pub fn stderr() -> Self {
        Console::new(Box::new(io::stderr()), io::stderr().is_terminal())
    }

    pub fn new(writer: Box<dyn Write + Send>, is_terminal: bool) -> Self {
        let out = Out { writer, failure: FirstFailure::default() };
        Console { out: Mutex::new(out), bar: Mutex::new(None), is_terminal }
    }

    /// Prints a line in one write, above the bar if there is one. Returns the error of the first
    /// line that cannot be printed.
    pub fn print(&self, line: &str) -> Option<io::Error> {
        let bytes = format!("{line}\n");
        // Cloned out of the lock: a suspended bar redraws itself through this console, which locks
        // again.
        let bar = lock(&self.bar).clone();
        match bar {
            Some(bar) => bar.suspend(|| self.write(&bytes)),
            None => self.write(&bytes),
        }
    }

    fn write(&self, text: &str) -> Option<io::Error> {
        let mut out = lock(&self.out);
        let result = out.writer.write_all(text.as_bytes()).and_then(|()| out.writer.flush());
        out.failure.first(result)
    }

    /// Shows the bar below the lines.
    pub fn show_bar(self: &Arc<Self>, total: u64, start: u64) -> ProgressBar {
        let target = match self.is_terminal {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::term_like_with_hz(Box::new(Pipe(Arc::clone(self))), 2),
        };
        let style = ProgressStyle::with_template("{bar:28.blue} {pos}/{len}  {wide_msg}")
            .expect("the template is valid");
        let bar = ProgressBar::with_draw_target(Some(total), target)
            .with_style(style.progress_chars("━╸─"))
            .with_position(start);
        *lock(&self.bar) = Some(bar.clone());
        bar
    }

    pub fn clear_bar(&self) {
        let bar = lock(&self.bar).take();
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
    }
}

/// Locks a mutex, even a poisoned one: another thread panicked while it logged, but its text is
/// still sound.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pipe to a terminal whose size is unknown.
struct Pipe(Arc<Console>);

impl fmt::Debug for Pipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pipe")
    }
}

impl Pipe {
    /// Drops the bar if the pipe is closed; the next log line reports the error.
    fn send(&self, text: &str) -> io::Result<()> {
        lock(&self.0.out).writer.write_all(text.as_bytes())
    }

    fn move_cursor(&self, count: usize, direction: char) -> io::Result<()> {
        if count == 0 { Ok(()) } else { self.send(&format!("\x1b[{count}{direction}")) }
    }
}

impl TermLike for Pipe {
    fn width(&self) -> u16 {
        PIPE_COLUMNS
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'D')
    }

    fn write_line(&self, s: &str) -> io::Result<()> {
        self.send(&format!("{s}\n"))
    }

    fn write_str(&self, s: &str) -> io::Result<()> {
        self.send(s)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.send("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        lock(&self.0.out).writer.flush()
    }
}

/// Substitute for standard error whose content a test can read.
#[cfg(test)]
#[derive(Clone, Default)]
pub(super) struct Page(Arc<Mutex<Vec<Vec<u8>>>>);

#[cfg(test)]
impl Page {
    /// Returns the text of each write.
    pub fn writes(&self) -> Vec<String> {
        lock(&self.0).iter().map(|write| String::from_utf8_lossy(write).into_owned()).collect()
    }

    pub fn text(&self) -> String {
        self.writes().concat()
    }
}

#[cfg(test)]
impl Write for Page {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).push(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct ClosedPipe;

    impl Write for ClosedPipe {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_is_one_write() {
        let page = Page::default();
        let console = Console::new(Box::new(page.clone()), false);
        assert!(console.print("one").is_none() && console.print("two").is_none());
        assert_eq!(page.writes(), ["one\n", "two\n"]);
    }

    #[test]
    fn a_closed_pipe_is_told_once_and_survived() {
        let console = Console::new(Box::new(ClosedPipe), false);
        assert_eq!(console.print("one").map(|error| error.kind()), Some(io::ErrorKind::BrokenPipe));
        assert!(console.print("two").is_none());
    }

    #[test]
    fn a_line_under_a_bar_stands_alone_on_its_row() {
        let page = Page::default();
        let console = Arc::new(Console::new(Box::new(page.clone()), false));
        console.show_bar(10, 0).tick();
        console.print("saved");
        console.clear_bar();
        let text = page.text();
        let before = text.split("saved\n").next().unwrap();
        assert!(before.contains("0/10"), "the bar was drawn: {before:?}");
        assert!(before.ends_with("\r\x1b[2K"), "and cleared before the line: {before:?}");
    }
}
