//! QEMU's control protocol (QMP): one JSON object a line, over an inherited socket.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{fd::BorrowedFd, unix::net::UnixStream as StdStream},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

/// A QMP session, past its greeting.
#[derive(Debug)]
pub struct Qmp {
    lines: tokio::io::Lines<BufReader<OwnedReadHalf>>,
    writer: OwnedWriteHalf,
    /// Events that arrived while an answer was awaited, oldest first.
    events: Vec<Event>,
}

/// Something QEMU says unasked.
#[derive(Debug, Deserialize)]
pub struct Event {
    /// Its name: `MIGRATION`, `STOP`, ...
    pub event: String,
    /// What it carries.
    #[serde(default)]
    pub data: Value,
}

impl Qmp {
    /// Reads the greeting and leaves negotiation mode.
    ///
    /// # Errors
    /// The socket's, or UnexpectedEof when QEMU ends first.
    pub async fn connect(stream: StdStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (reader, writer) = UnixStream::from_std(stream)?.into_split();
        let lines = BufReader::new(reader).lines();
        let mut qmp = Self { lines, writer, events: Vec::new() };
        qmp.message().await?;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs one command and returns what it answers.
    ///
    /// # Errors
    /// The socket's, or `Other` with QEMU's own words.
    pub async fn execute(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.writer.write_all(line.as_bytes()).await?;
        self.answer(command).await
    }

    /// Hands QEMU a descriptor, which commands then call `name`.
    ///
    /// # Errors
    /// The socket's, or `Other` with QEMU's own words.
    pub async fn give_fd(&mut self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.execute_with_fd("getfd", json!({ "fdname": name }), fd).await
    }

    /// Hands QEMU a descriptor, which it then finds as `/dev/fdset/SET`.
    ///
    /// # Errors
    /// The socket's, or `Other` with QEMU's own words.
    pub async fn add_fd(&mut self, set: u32, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.execute_with_fd("add-fd", json!({ "fdset-id": set }), fd).await
    }

    async fn execute_with_fd(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        let stream: &UnixStream = self.writer.as_ref();
        loop {
            stream.writable().await?;
            match stream.try_io(Interest::WRITABLE, || send_with_fd(stream, line.as_bytes(), fd)) {
                Ok(sent) if sent == line.len() => break,
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Err(err) => return Err(err),
            }
        }
        self.answer(command).await?;
        Ok(())
    }

    async fn answer(&mut self, command: &str) -> io::Result<Value> {
        loop {
            let mut message = self.message().await?;
            if message.get("event").is_some() {
                self.events.push(serde_json::from_value(message)?);
            } else if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            } else {
                let why = message["error"]["desc"].as_str().unwrap_or("no reason given");
                return Err(io::Error::other(format!("QEMU refused {command}: {why}")));
            }
        }
    }

    /// Waits until a migration (our saving and loading of device state) has ended.
    ///
    /// # Errors
    /// The socket's, or `Other` when it failed.
    pub async fn migration_ended(&mut self) -> io::Result<()> {
        loop {
            let event = self.event().await?;
            match (event.event.as_str(), event.data["status"].as_str()) {
                ("MIGRATION", Some("completed")) => return Ok(()),
                ("MIGRATION", Some("failed")) => {
                    return Err(io::Error::other("QEMU could not transfer the device state"));
                }
                _ => {}
            }
        }
    }

    /// Waits until a device is gone.
    ///
    /// # Errors
    /// The socket's.
    pub async fn device_deleted(&mut self, device: &str) -> io::Result<()> {
        loop {
            let event = self.event().await?;
            if event.event == "DEVICE_DELETED" && event.data["device"] == device {
                return Ok(());
            }
        }
    }

    /// Forgets what was said unasked: nobody waits for it.
    pub fn drop_events(&mut self) {
        self.events.clear();
    }

    async fn event(&mut self) -> io::Result<Event> {
        if !self.events.is_empty() {
            return Ok(self.events.remove(0));
        }
        loop {
            let message = self.message().await?;
            if message.get("event").is_some() {
                return Ok(serde_json::from_value(message)?);
            }
        }
    }

    async fn message(&mut self) -> io::Result<Value> {
        match self.lines.next_line().await? {
            Some(line) => Ok(serde_json::from_str(&line)?),
            None => {
                Err(io::Error::new(io::ErrorKind::UnexpectedEof, "QEMU closed its control socket"))
            }
        }
    }
}

fn send_with_fd(stream: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    message.push(SendAncillaryMessage::ScmRights(&fds));
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut message, SendFlags::empty())?)
}
