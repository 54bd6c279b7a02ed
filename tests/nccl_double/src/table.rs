//! Handles that are no addresses, so that every wrong one is told.

use std::collections::BTreeMap;

use crate::failure::fail;

/// Live things of one sort by handle.
pub struct Table<T> {
    /// What one is called.
    name: &'static str,
    /// Upper half of the handles.
    tag: usize,
    made: usize,
    live: BTreeMap<usize, T>,
}

impl<T> Table<T> {
    pub const fn new(name: &'static str, tag: usize) -> Self {
        Table { name, tag, made: 0, live: BTreeMap::new() }
    }

    pub fn add(&mut self, thing: T) -> usize {
        self.made += 1;
        let handle = (self.tag << 32) | (self.made << 4);
        self.live.insert(handle, thing);
        handle
    }

    /// # Panics
    /// Ends the process if there is no such thing, saying that `function` was called with it.
    pub fn get(&mut self, handle: usize, function: &str) -> &mut T {
        let label = self.label(handle, function);
        self.live.get_mut(&handle).unwrap_or_else(|| fail(label()))
    }

    pub fn remove(&mut self, handle: usize, function: &str) -> T {
        let label = self.label(handle, function);
        self.live.remove(&handle).unwrap_or_else(|| fail(label()))
    }

    /// The thing, if it has not gone.
    pub fn find(&mut self, handle: usize) -> Option<&mut T> {
        self.live.get_mut(&handle)
    }

    pub fn peek(&self, handle: usize) -> Option<&T> {
        self.live.get(&handle)
    }

    /// Puts back what [`Table::remove`] took for a moment.
    pub fn put_back(&mut self, handle: usize, thing: T) {
        self.live.insert(handle, thing);
    }

    pub fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        self.live.iter().map(|(handle, thing)| (*handle, thing))
    }

    /// `stream 2`, in the order in which they were made.
    pub fn title(&self, handle: usize) -> String {
        format!("{} {}", self.name, (handle & 0xffff_ffff) >> 4)
    }

    fn label(&self, handle: usize, function: &str) -> impl Fn() -> String + use<T> {
        let was_made = handle >> 32 == self.tag
            && handle & 15 == 0
            && (1..=self.made).contains(&((handle & 0xffff_ffff) >> 4));
        let (title, name, function) = (self.title(handle), self.name, function.to_string());
        move || match was_made {
            true => format!("{function}: {title} is used after its end"),
            false => format!("{function}: {handle:#x} is no {name}"),
        }
    }
}
