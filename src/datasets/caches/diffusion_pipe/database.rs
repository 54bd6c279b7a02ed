//! The databases of diffusion-pipe: `metadata.db`, of SQLite, says where the records lie in the
//! files `shard_<number>.bin` beside it. Databases are untrusted: they are opened read-only and
//! unshared, hold plain tables and nothing else, and queries end when they take more steps than a
//! sound file of that size needs.
//!
//! Source: diffusion-pipe 8f83dbf, `utils/cache.py`.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rusqlite::config::DbConfig;
use rusqlite::limits::Limit;
use rusqlite::{Connection, OpenFlags};

use crate::datasets::caches::file::Location;
use crate::error::{Error, Result};
use crate::files::pickle::Region;
use crate::files::safetensors::open_error;

pub(super) const NAME: &str = "metadata.db";
/// Files beside a database that is being written, or whose writing was interrupted.
const UNFINISHED: [&str; 2] = ["metadata.db-journal", "metadata.db-wal"];
const SHARD: &str = "shard_";

/// Longest text or row that is read, and longest statement.
const MAX_TEXT_BYTES: i32 = 4096;
/// A row of two numbers takes as many bytes of the file at least.
const ROW_BYTES: u64 = 4;
/// Steps of SQLite's machine between two looks at their number.
const STEPS: i32 = 1000;
/// Steps that all queries together may take: more than a sound file of its size needs.
const FREE_STEPS: u64 = 100_000;
const STEPS_OF_A_ROW: u64 = 16;

/// Returns the records of a database in their order.
///
/// # Errors
/// [`Error::Data`] if it is no database, damaged, holds more than tables, or its numbers do not fit
/// together or the files.
pub(super) fn records(path: &Path) -> Result<Vec<Location>> {
    let database = Database::open(path)?;
    let tables = database.tables()?;
    let needed = |name: &str| {
        let missing =
            || database.refused(format!("holds no table `{name}`, as diffusion-pipe does"));
        if tables.iter().any(|table| table == name) { Ok(()) } else { Err(missing()) }
    };
    needed("items")?;
    let mut shards: BTreeMap<u64, Shard> = BTreeMap::new();
    let mut found = Vec::new();
    for [number, index] in database.rows("items", ["shard", "shard_index"])? {
        let shard = match shards.entry(number) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let name = format!("{SHARD}{number}");
                needed(&name)?;
                let regions = database.rows(&name, ["offset", "size"])?;
                let path = path.with_file_name(format!("{name}.bin"));
                unknown.insert(Shard::new(path, &regions)?)
            }
        };
        found.push(shard.take(index).ok_or_else(|| {
            database.refused(format!("refers to record {index} of {SHARD}{number}, which lacks it or was referred to before"))
        })?);
    }
    Ok(found)
}

/// One file of records.
struct Shard {
    path: PathBuf,
    regions: Vec<Option<Region>>,
}

impl Shard {
    /// Refuses records that overlap or lie outside of the file: a small cache must not become a
    /// large dataset.
    fn new(path: PathBuf, rows: &[[u64; 2]]) -> Result<Self> {
        let found = fs::metadata(&path).map_err(|error| open_error(&path, error))?;
        let mut regions: Vec<Region> =
            rows.iter().map(|[start, bytes]| Region { start: *start, bytes: *bytes }).collect();
        let whole = regions.iter().copied().map(Some).collect();
        regions.sort();
        let mut end = 0;
        for Region { start, bytes } in regions {
            let after = start.checked_add(bytes).filter(|after| *after <= found.len());
            let Some(after) = after.filter(|_| start >= end) else {
                let what = format!(
                    "has {} bytes; a record of {bytes} bytes from byte {start} on overlaps another \
                     or does not fit",
                    found.len()
                );
                return Err(Error::data(path, what));
            };
            end = after;
        }
        Ok(Shard { path, regions: whole })
    }

    fn take(&mut self, index: u64) -> Option<Location> {
        let region = self.regions.get_mut(usize::try_from(index).ok()?)?.take()?;
        Some(Location { path: self.path.clone(), region: Some(region) })
    }
}

/// An open database.
struct Database {
    path: PathBuf,
    connection: Connection,
    bytes: u64,
}

impl Database {
    fn open(path: &Path) -> Result<Self> {
        let found = fs::metadata(path).map_err(|error| open_error(path, error))?;
        if !found.is_file() {
            return Err(Error::data(path, "is not a regular file"));
        }
        for name in UNFINISHED {
            if fs::metadata(path.with_file_name(name)).is_ok_and(|beside| beside.len() > 0) {
                let what = format!(
                    "stands beside {name}: it is being written, or its writing was interrupted; \
                     let diffusion-pipe finish it"
                );
                return Err(Error::data(path, what));
            }
        }
        let damaged = |error| damage(path, &error);
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
            | OpenFlags::SQLITE_OPEN_URI
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_PRIVATE_CACHE;
        let mut connection = Connection::open_with_flags(uri(path), flags).map_err(damaged)?;
        let mut left = FREE_STEPS.saturating_add(found.len() / ROW_BYTES * STEPS_OF_A_ROW);
        let too_many = move || {
            left = left.saturating_sub(STEPS as u64);
            left == 0
        };
        connection.progress_handler(STEPS, Some(too_many)).map_err(damaged)?;
        let database = Database { path: path.into(), connection, bytes: found.len() };
        database.guard().map_err(damaged)?;
        Ok(database)
    }

    /// Switches everything off that reading two tables does not need.
    fn guard(&self) -> rusqlite::Result<()> {
        let connection = &self.connection;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, false)?;
        for (limit, value) in [
            (Limit::SQLITE_LIMIT_LENGTH, MAX_TEXT_BYTES),
            (Limit::SQLITE_LIMIT_SQL_LENGTH, MAX_TEXT_BYTES),
            (Limit::SQLITE_LIMIT_COLUMN, 16),
            (Limit::SQLITE_LIMIT_EXPR_DEPTH, 16),
            (Limit::SQLITE_LIMIT_COMPOUND_SELECT, 2),
            (Limit::SQLITE_LIMIT_VDBE_OP, 1000),
            (Limit::SQLITE_LIMIT_FUNCTION_ARG, 4),
            (Limit::SQLITE_LIMIT_ATTACHED, 0),
            (Limit::SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 64),
            (Limit::SQLITE_LIMIT_VARIABLE_NUMBER, 4),
            (Limit::SQLITE_LIMIT_TRIGGER_DEPTH, 1),
            (Limit::SQLITE_LIMIT_WORKER_THREADS, 0),
        ] {
            connection.set_limit(limit, value)?;
        }
        connection.execute_batch("PRAGMA cell_size_check = ON; PRAGMA mmap_size = 0")
    }

    /// Returns the names of the tables.
    ///
    /// # Errors
    /// [`Error::Data`] if there is anything else, such as a view, which could compute without end.
    fn tables(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let read = |row: &rusqlite::Row<'_>| {
            Ok((
                row.get::<_, String>(0)?,
                row.get::<_, String>(1)?,
                row.get::<_, Option<String>>(2)?,
            ))
        };
        self.each("SELECT type, name, sql FROM sqlite_schema", read, |(kind, name, sql)| {
            let plain = sql.is_some_and(|sql| sql.to_ascii_uppercase().starts_with("CREATE TABLE"));
            if kind != "table" || !plain {
                return Err(
                    self.refused(format!("holds the {kind} `{name}`; expected plain tables"))
                );
            }
            names.push(name);
            Ok(())
        })?;
        Ok(names)
    }

    /// Returns two columns of numbers, in the order in which rows were inserted. The table is known
    /// to be one of [`tables`](Self::tables), and made of letters, digits and `_`.
    fn rows(&self, table: &str, columns: [&str; 2]) -> Result<Vec<[u64; 2]>> {
        let mut rows = Vec::new();
        let [first, second] = columns;
        let query = format!("SELECT {first}, {second} FROM {table} ORDER BY rowid");
        let read = |row: &rusqlite::Row<'_>| Ok([row.get::<_, i64>(0)?, row.get::<_, i64>(1)?]);
        self.each(&query, read, |row| {
            let [Ok(first), Ok(second)] = row.map(u64::try_from) else {
                let what = format!("holds a negative number in table `{table}`: {row:?}");
                return Err(self.refused(what));
            };
            if rows.len() as u64 > self.bytes / ROW_BYTES {
                return Err(self.refused(format!("holds more rows in `{table}` than fit into it")));
            }
            rows.push([first, second]);
            Ok(())
        })?;
        Ok(rows)
    }

    /// Hands each row of a query over.
    fn each<T>(
        &self,
        query: &str,
        read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
        mut take: impl FnMut(T) -> Result<()>,
    ) -> Result<()> {
        let damaged = |error| damage(&self.path, &error);
        let mut statement = self.connection.prepare(query).map_err(damaged)?;
        for row in statement.query_map([], read).map_err(damaged)? {
            take(row.map_err(damaged)?)?;
        }
        Ok(())
    }

    fn refused(&self, what: String) -> Error {
        Error::data(&self.path, what)
    }
}

/// Turns what SQLite says into one line about the file.
fn damage(path: &Path, error: &rusqlite::Error) -> Error {
    let mut said = error.to_string();
    said.truncate(said.find('\n').unwrap_or(said.len()));
    Error::data(path, format!("is no database of SQLite that can be read, or damaged: {said}"))
}

/// Names the file so that SQLite neither changes nor locks it, nor looks for files beside it.
fn uri(path: &Path) -> String {
    let mut uri = String::from("file:");
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'-' => {
                uri.push(char::from(*byte));
            }
            other => write!(uri, "%{other:02x}").expect("a string grows"),
        }
    }
    uri + "?immutable=1"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_character_of_a_path_is_a_setting_of_the_database() {
        assert_eq!(
            uri(Path::new("/a b/c?mode=rwc#%")),
            "file:/a%20b/c%3fmode%3drwc%23%25?immutable=1"
        );
    }
}
