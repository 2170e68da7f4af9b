//! A server over the echo backend, and clients made by hand.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

pub mod echo;

use a3s_box_streaming::{
    AttachRequest, Config, ExecRequest, PortForwardRequest, Server, Urls,
    spdy::{Compressor, Decompressor, Frame, Reader, flag},
};
use bytes::{Bytes, BytesMut};
use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

/// Longer than anything takes here.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How the test's server is configured.
pub fn config() -> Config {
    Config {
        address: ([127, 0, 0, 1], 0).into(),
        advertised: None,
        idle: Duration::from_secs(60),
        creation: Duration::from_secs(5),
    }
}

/// A running server.
pub struct Running {
    pub urls: Urls,
    sessions: Arc<AtomicUsize>,
}

impl Running {
    pub async fn start() -> Self {
        Self::with(Server::bind(config()).await.unwrap())
    }

    pub fn with(server: Server) -> Self {
        let backend = Arc::new(echo::Echo::default());
        let (urls, sessions) = (server.urls(), backend.running.clone());
        tokio::spawn(server.serve(backend));
        Self { urls, sessions }
    }

    /// The URL of a command. Flags: t: tty, c: stdin, i: stdout, o: stderr.
    pub fn exec(&self, flags: &str, command: &str) -> String {
        let has = |flag| flags.contains(flag);
        let request = ExecRequest {
            container_id: "container".to_owned(),
            command: command.split(' ').map(str::to_owned).collect(),
            tty: has('t'),
            stdin: has('c'),
            stdout: has('i'),
            stderr: has('o'),
        };
        self.urls.exec(request).unwrap()
    }

    pub fn attach(&self) -> String {
        let request = AttachRequest {
            container_id: "container".to_owned(),
            tty: false,
            stdin: true,
            stdout: true,
            stderr: false,
        };
        self.urls.attach(request).unwrap()
    }

    pub fn forward(&self, ports: &[u16]) -> String {
        let request = PortForwardRequest { sandbox_id: "pod".to_owned(), ports: ports.to_vec() };
        self.urls.port_forward(request).unwrap()
    }

    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::SeqCst)
    }

    /// Waits until this many sessions are under way.
    pub async fn until_sessions(&self, count: usize) {
        let wait = async {
            while self.sessions() != count {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, wait).await.expect("sessions neither begin nor end as they should");
    }
}

/// Host and path of a URL.
pub fn split(url: &str) -> (&str, &str) {
    let rest = url.split_once("://").expect("a URL").1;
    rest.split_at(rest.find('/').expect("a path"))
}

/// Sends a request's head; the answer's head and the connection.
pub async fn ask(url: &str, method: &str, headers: &[&str]) -> (String, TcpStream) {
    let (host, path) = split(url);
    let mut stream = TcpStream::connect(host).await.unwrap();
    let headers = headers.iter().map(|header| format!("{header}\r\n")).collect::<String>();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap());
    }
    (String::from_utf8(answer).unwrap(), stream)
}

/// A status line's code.
pub fn code(head: &str) -> u16 {
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

/// A SPDY client.
pub struct Spdy {
    pub io: TcpStream,
    reader: Reader,
    buffer: BytesMut,
    compressor: Compressor,
    decompressor: Decompressor,
    next: u32,
    /// What came while a reply was waited for.
    early: VecDeque<Frame>,
}

/// What came on the streams until their ends.
#[derive(Debug, Default)]
pub struct Heard {
    pub bytes: HashMap<u32, Vec<u8>>,
    pub ended: Vec<u32>,
    pub reset: Vec<u32>,
}

impl Heard {
    pub fn text(&self, id: u32) -> String {
        String::from_utf8(self.bytes.get(&id).cloned().unwrap_or_default()).unwrap()
    }
}

impl Spdy {
    pub async fn connect(url: &str, protocol: &str) -> Self {
        let protocol = format!("X-Stream-Protocol-Version: {protocol}");
        let headers = ["Connection: Upgrade", "Upgrade: SPDY/3.1", &protocol];
        let (head, io) = ask(url, "POST", &headers).await;
        assert_eq!(code(&head), 101, "{head}");
        Self {
            io,
            reader: Reader::default(),
            buffer: BytesMut::new(),
            compressor: Compressor::default(),
            decompressor: Decompressor::default(),
            next: 1,
            early: VecDeque::new(),
        }
    }

    pub async fn send(&mut self, frame: Frame) {
        let mut bytes = BytesMut::new();
        frame.write(&mut bytes);
        self.io.write_all(&bytes).await.unwrap();
    }

    pub async fn data(&mut self, id: u32, bytes: &[u8]) {
        self.send(Frame::Data { id, flags: 0, bytes: Bytes::copy_from_slice(bytes) }).await;
    }

    /// Sends nothing more on a stream.
    pub async fn end(&mut self, id: u32) {
        self.send(Frame::Data { id, flags: flag::FIN, bytes: Bytes::new() }).await;
    }

    /// Begins a stream and waits for its reply.
    pub async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.next;
        self.next += 2;
        let block = self.compressor.pack(headers);
        self.send(Frame::SynStream { id, flags: 0, block }).await;
        loop {
            match self.read().await.expect("an open connection") {
                Frame::SynReply { id: replied, block, .. } if replied == id => {
                    self.decompressor.unpack(&block).unwrap();
                    return id;
                }
                other => self.early.push_back(other),
            }
        }
    }

    /// Begins remotecommand streams.
    pub async fn open_all<const N: usize>(&mut self, kinds: [&str; N]) -> [u32; N] {
        let mut ids = [0; N];
        for (id, kind) in ids.iter_mut().zip(kinds) {
            *id = self.open(&[("streamtype", kind)]).await;
        }
        ids
    }

    /// The next frame; `None`: the connection has ended.
    pub async fn receive(&mut self) -> Option<Frame> {
        match self.early.pop_front() {
            Some(frame) => Some(frame),
            None => self.read().await,
        }
    }

    async fn read(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.reader.next(&mut self.buffer).unwrap() {
                return Some(frame);
            }
            let read = timeout(PATIENCE, self.io.read_buf(&mut self.buffer)).await;
            if read.expect("bytes or an end").unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    /// Everything until the connection ends.
    pub async fn hear(&mut self) -> Heard {
        let mut heard = Heard::default();
        while let Some(frame) = self.receive().await {
            match frame {
                Frame::Data { id, flags, bytes } => {
                    heard.bytes.entry(id).or_default().extend_from_slice(&bytes);
                    if flags & flag::FIN != 0 {
                        heard.ended.push(id);
                    }
                }
                Frame::RstStream { id, .. } => heard.reset.push(id),
                _ => {}
            }
        }
        heard
    }
}
