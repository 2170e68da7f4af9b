//! PortForward: one connection to a port inside the pod.

use crate::{
    agent::{Agent, blocking},
    error::{Error, Step},
};
use a3s_box_api::agent::v1 as api;
use bytes::Bytes;
use rustix::{
    fd::OwnedFd,
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
};
use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
};
use tonic::{Status, Streaming};

/// The largest message.
const CHUNK: usize = 32 << 10;

/// What the call answers.
pub type Answer = Result<api::PortOutput, Status>;

/// Connects to the port on the pod's loopback, IPv4 first as the peers do.
pub async fn connect(agent: &Arc<Agent>, port: u32) -> Result<TcpStream, Error> {
    let port = u16::try_from(port).ok().filter(|port| *port > 0);
    let port = port.ok_or_else(|| Error::invalid("port is not between 1 and 65535"))?;
    let addresses = [
        SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
    ];
    let mut refused = io::Error::from(io::ErrorKind::ConnectionRefused);
    for address in addresses {
        match socket(agent, address).await?.connect(address).await {
            Ok(stream) => {
                // Interactive traffic must not wait for more of it.
                stream.set_nodelay(true).ok();
                return Ok(stream);
            }
            Err(error) if address.is_ipv4() => refused = error,
            Err(_) => {}
        }
    }
    Err(refused).step(format_args!("dial tcp {}", addresses[0]))
}

/// A socket in the pod's network namespace.
async fn socket(agent: &Arc<Agent>, to: SocketAddr) -> Result<TcpSocket, Error> {
    let open = move || -> io::Result<OwnedFd> {
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(socket_with(family, SocketType::STREAM, flags, None)?)
    };
    let socket = if agent.user_namespace().is_some() {
        let agent = Arc::clone(agent);
        blocking(move || match agent.user_namespace() {
            Some(namespace) => namespace.in_network(open).flatten().step("socket"),
            None => open().step("socket"),
        })
        .await?
    } else {
        open().step("socket")?
    };
    Ok(TcpSocket::from_std_stream(socket.into()))
}

/// Carries both ways until the pod's side has closed or the caller is gone.
pub async fn run(
    stream: TcpStream,
    first: api::PortInput,
    inputs: Streaming<api::PortInput>,
    answers: mpsc::Sender<Answer>,
) {
    let (from_pod, to_pod) = stream.into_split();
    let feeding = tokio::spawn(feed(first, inputs, to_pod));
    // The caller may be gone first.
    tokio::select! {
        () = drain(from_pod, &answers) => {}
        () = answers.closed() => {}
    }
    feeding.abort();
}

async fn feed(
    first: api::PortInput,
    mut inputs: Streaming<api::PortInput>,
    mut pod: OwnedWriteHalf,
) {
    let mut next = Some(first);
    while let Some(message) = next {
        if pod.write_all(&message.data).await.is_err() {
            return;
        }
        if message.close && pod.shutdown().await.is_err() {
            return;
        }
        next = inputs.message().await.ok().flatten();
    }
}

async fn drain(mut pod: OwnedReadHalf, answers: &mpsc::Sender<Answer>) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(count @ 1..) = pod.read(&mut buffer).await {
        let data = Bytes::copy_from_slice(&buffer[..count]);
        if answers.send(Ok(api::PortOutput { data })).await.is_err() {
            return;
        }
    }
}
