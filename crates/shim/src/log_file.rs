//! A container's log in CRI's format: one line an entry, `TIME STREAM TAG TEXT`.
//!
//! One task per container writes its file. Output comes over a bounded channel: a slow disk slows
//! the container, and nothing else. A line longer than [`LINE_MAX`] is written in parts, all but the
//! last tagged `P`.

use bytes::Bytes;
use std::{
    io,
    path::{Path, PathBuf},
};
use tokio::{
    fs::{File, OpenOptions},
    io::AsyncWriteExt,
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

/// Longest text of one entry in bytes, as containerd's default.
pub const LINE_MAX: usize = 16 * 1024;
/// Chunks on their way to the file.
const WAITING: usize = 16;

/// Which of a container's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Also a terminal's output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }
}

enum Order {
    Output(Stream, Bytes),
    Reopen(oneshot::Sender<io::Result<()>>),
}

/// A handle on a container's log; the file is closed after the last one is gone.
#[derive(Debug, Clone)]
pub struct Log(mpsc::Sender<Order>);

impl Log {
    /// Opens the file at `path`, with its folders, and starts its task; without a path output is
    /// dropped.
    ///
    /// # Errors
    /// The file's.
    pub async fn open(path: Option<PathBuf>) -> io::Result<(Self, JoinHandle<()>)> {
        let file = match &path {
            Some(path) => Some(create(path).await?),
            None => None,
        };
        let (sender, orders) = mpsc::channel(WAITING);
        let writer = Writer { path, file, lines: Lines::default(), failing: false };
        Ok((Self(sender), tokio::spawn(writer.run(orders))))
    }

    /// Adds output; waits when the file is slow.
    pub async fn write(&self, stream: Stream, bytes: Bytes) {
        // The task ends only after the last handle.
        self.0.send(Order::Output(stream, bytes)).await.ok();
    }

    /// Writes what came before to the old file, then opens the path anew.
    ///
    /// # Errors
    /// The new file's; output then still goes to the old one.
    pub async fn reopen(&self) -> io::Result<()> {
        let (answer, answered) = oneshot::channel();
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "the log's writer has ended");
        self.0.send(Order::Reopen(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

async fn create(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        tokio::fs::create_dir_all(folder).await?;
    }
    OpenOptions::new().create(true).append(true).mode(0o640).open(path).await
}

struct Writer {
    path: Option<PathBuf>,
    file: Option<File>,
    lines: Lines,
    failing: bool,
}

impl Writer {
    async fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        while let Some(order) = orders.recv().await {
            match order {
                Order::Output(stream, bytes) => {
                    let mut entries = Vec::new();
                    self.lines.push(stream, &bytes, &timestamp(), &mut entries);
                    self.append(&entries).await;
                }
                Order::Reopen(answer) => {
                    // Nobody waits any more: the file is reopened all the same.
                    answer.send(self.reopen().await).ok();
                }
            }
        }
        let mut rest = Vec::new();
        self.lines.finish(&timestamp(), &mut rest);
        self.append(&rest).await;
    }

    async fn reopen(&mut self) -> io::Result<()> {
        if let Some(path) = &self.path {
            self.file = Some(create(path).await?);
        }
        Ok(())
    }

    /// A log that cannot be written must not stop the container: said once, then dropped.
    async fn append(&mut self, entries: &[u8]) {
        let Some(file) = &mut self.file else { return };
        if entries.is_empty() {
            return;
        }
        let written = match file.write_all(entries).await {
            Ok(()) => file.flush().await,
            Err(err) => Err(err),
        };
        match written {
            Ok(()) => self.failing = false,
            Err(err) if !self.failing => {
                self.failing = true;
                tracing::warn!(log = ?self.path, %err, "log lines are being lost");
            }
            Err(_) => {}
        }
    }
}

fn timestamp() -> String {
    format!("{:.9}", jiff::Timestamp::now())
}

/// Output that is not yet a whole line, of both streams.
#[derive(Debug, Default)]
struct Lines {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Lines {
    fn push(&mut self, stream: Stream, bytes: &[u8], time: &str, out: &mut Vec<u8>) {
        let rest = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            rest.extend_from_slice(text);
            let mut from = 0;
            while rest.len() - from > LINE_MAX {
                entry(stream, "P", &rest[from..from + LINE_MAX], time, out);
                from += LINE_MAX;
            }
            if ends {
                let text = &rest[from..];
                entry(stream, "F", text.strip_suffix(b"\r").unwrap_or(text), time, out);
                rest.clear();
            } else {
                rest.drain(..from);
            }
        }
    }

    /// What is left without a line's end is a part of one.
    fn finish(&mut self, time: &str, out: &mut Vec<u8>) {
        for (stream, rest) in
            [(Stream::Stdout, &mut self.stdout), (Stream::Stderr, &mut self.stderr)]
        {
            if !rest.is_empty() {
                entry(stream, "P", rest, time, out);
                rest.clear();
            }
        }
    }
}

fn entry(stream: Stream, tag: &str, text: &[u8], time: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(format!("{time} {} {tag} ", stream.name()).as_bytes());
    out.extend_from_slice(text);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(pieces: &[(Stream, &str)]) -> String {
        let (mut lines, mut out) = (Lines::default(), Vec::new());
        for (stream, text) in pieces {
            lines.push(*stream, text.as_bytes(), "T", &mut out);
        }
        lines.finish("T", &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_line_is_one_entry_however_its_bytes_arrive() {
        use Stream::{Stderr, Stdout};
        let pieces = [(Stdout, "he"), (Stderr, "no\n"), (Stdout, "llo\n\nrest"), (Stdout, "!")];
        let wanted = "T stderr F no\nT stdout F hello\nT stdout F \nT stdout P rest!\n";
        assert_eq!(entries(&pieces), wanted);
    }

    #[test]
    fn a_terminals_line_end_is_one_line_end() {
        assert_eq!(entries(&[(Stream::Stdout, "a\r\nb\r\n")]), "T stdout F a\nT stdout F b\n");
    }

    #[test]
    fn a_long_line_is_written_in_parts_and_loses_nothing() {
        let long = "x".repeat(2 * LINE_MAX + 5);
        let text = entries(&[(Stream::Stdout, &long), (Stream::Stdout, "\n")]);
        let tags: Vec<&str> = text.lines().map(|line| line.split(' ').nth(2).unwrap()).collect();
        assert_eq!(tags, ["P", "P", "F"]);
        assert_eq!(text.matches('x').count(), long.len());
        let exact = "y".repeat(LINE_MAX);
        assert_eq!(
            entries(&[(Stream::Stdout, &format!("{exact}\n"))]),
            format!("T stdout F {exact}\n")
        );
    }

    #[tokio::test]
    async fn rotation_loses_no_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pod/0.log");
        let (log, task) = Log::open(Some(path.clone())).await.unwrap();
        log.write(Stream::Stdout, Bytes::from_static(b"before\nhalf ")).await;
        let old = folder.path().join("pod/0.log.1");
        // As kubelet does: rename, then ask for a new file.
        log.reopen().await.unwrap();
        std::fs::rename(&path, &old).unwrap();
        log.reopen().await.unwrap();
        log.write(Stream::Stdout, Bytes::from_static(b"after\n")).await;
        drop(log);
        task.await.unwrap();
        let (old, new) =
            (std::fs::read_to_string(old).unwrap(), std::fs::read_to_string(path).unwrap());
        assert!(old.ends_with("stdout F before\n"), "{old}");
        assert!(new.ends_with("stdout F half after\n"), "{new}");
    }

    #[tokio::test]
    async fn a_full_disk_does_not_stop_the_container() {
        let (log, task) = Log::open(Some("/dev/full".into())).await.unwrap();
        for _ in 0..100 {
            log.write(Stream::Stdout, Bytes::from_static(b"line\n")).await;
        }
        drop(log);
        task.await.unwrap();
    }
}
