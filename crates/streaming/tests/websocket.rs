//! Sessions over WebSocket.
#![allow(clippy::unwrap_used)]

mod common;

use common::{PATIENCE, Running, Spdy, split};
use futures::{SinkExt, StreamExt};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, client::IntoClientRequest, protocol::frame::coding::CloseCode},
};

type Client = WebSocketStream<TcpStream>;

async fn connect(url: &str, protocol: Option<&str>) -> Client {
    let mut request = url.replacen("http", "ws", 1).into_client_request().unwrap();
    if let Some(protocol) = protocol {
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
    }
    let stream = TcpStream::connect(split(url).0).await.unwrap();
    let (client, answer) = client_async(request, stream).await.unwrap();
    let chosen = answer.headers().get("sec-websocket-protocol");
    assert_eq!(chosen.map(|value| value.to_str().unwrap()), protocol);
    client
}

/// Everything until the goodbye, by channel; each message's first byte is its channel.
async fn hear(client: &mut Client) -> [Vec<u8>; 4] {
    let mut heard = <[Vec<u8>; 4]>::default();
    loop {
        match timeout(PATIENCE, client.next()).await.unwrap().unwrap().unwrap() {
            Message::Close(reason) => {
                assert_eq!(reason.unwrap().code, CloseCode::Normal);
                return heard;
            }
            message => {
                let bytes = message.into_data();
                heard[usize::from(bytes[0] & 0xf)].extend_from_slice(&bytes[1..]);
            }
        }
    }
}

#[tokio::test]
async fn every_protocol_tells_both_outputs_and_the_end() {
    let server = Running::start().await;
    let protocols =
        [None, Some("channel.k8s.io"), Some("v4.channel.k8s.io"), Some("v5.channel.k8s.io")];
    for protocol in protocols {
        let mut client = connect(&server.exec("io", "both 1"), protocol).await;
        let [_, stdout, stderr, errors] = hear(&mut client).await;
        assert_eq!((&*stdout, &*stderr), (&b"out 0\n"[..], &b"err 0\n"[..]), "{protocol:?}");
        let json = protocol.is_some_and(|protocol| protocol.starts_with('v'));
        assert_eq!(String::from_utf8(errors).unwrap().contains("Success"), json, "{protocol:?}");
    }
    for protocol in ["base64.channel.k8s.io", "v4.base64.channel.k8s.io"] {
        let mut client = connect(&server.exec("io", "both 1"), Some(protocol)).await;
        let [_, stdout, stderr, _] = hear(&mut client).await;
        assert_eq!((&*stdout, &*stderr), (&b"b3V0IDAK"[..], &b"ZXJyIDAK"[..]), "{protocol}");
    }
}

#[tokio::test]
async fn only_v5_can_tell_the_end_of_stdin() {
    let server = Running::start().await;
    let mut client = connect(&server.exec("ci", "cat"), Some("v5.channel.k8s.io")).await;
    client.send(Message::binary(b"\0bytes and ".as_slice())).await.unwrap();
    // Clients in other languages send text as text.
    client.send(Message::text("\0text")).await.unwrap();
    client.send(Message::binary(b"\xff\0".as_slice())).await.unwrap();
    let [_, stdout, ..] = hear(&mut client).await;
    assert_eq!(stdout, b"bytes and text");
    let mut client = connect(&server.exec("ci", "cat"), Some("v4.channel.k8s.io")).await;
    client.send(Message::binary(b"\xff\0".as_slice())).await.unwrap();
    client.send(Message::binary(b"\0still open".as_slice())).await.unwrap();
    loop {
        let message = timeout(PATIENCE, client.next()).await.unwrap().unwrap().unwrap();
        if message.into_data() == "\x01still open" {
            break;
        }
    }
    drop(client);
    server.until_sessions(0).await;
}

#[tokio::test]
async fn channels_that_are_none_are_passed_over() {
    let server = Running::start().await;
    let mut client = connect(&server.exec("ci", "cat"), Some("v5.channel.k8s.io")).await;
    for message in [&b""[..], b"\x01to stdout", b"\x09", b"\xfe", b"\xff", b"\xff\x03\x00"] {
        client.send(Message::binary(message)).await.unwrap();
    }
    client.send(Message::Ping("are you there".into())).await.unwrap();
    client.send(Message::binary(b"\0yes".as_slice())).await.unwrap();
    client.send(Message::binary(b"\xff\0".as_slice())).await.unwrap();
    let mut pong = false;
    let mut stdout = Vec::new();
    loop {
        match timeout(PATIENCE, client.next()).await.unwrap().unwrap().unwrap() {
            Message::Pong(bytes) => pong = bytes == "are you there",
            Message::Binary(bytes) if bytes[0] == 1 => stdout.extend_from_slice(&bytes[1..]),
            Message::Close(_) => break,
            _ => {}
        }
    }
    assert!(pong);
    assert_eq!(stdout, b"yes");
}

#[tokio::test]
async fn stdin_nobody_reads_does_not_cost_the_exit_code() {
    let server = Running::start().await;
    for _ in 0..20 {
        let mut client = connect(&server.exec("ci", "exit 9"), Some("v4.channel.k8s.io")).await;
        for _ in 0..8 {
            // The server may have gone on to its goodbye.
            client.send(Message::binary(vec![0; 16 << 10])).await.ok();
        }
        let [.., errors] = hear(&mut client).await;
        assert!(String::from_utf8(errors).unwrap().contains("\"message\":\"9\""));
    }
}

#[tokio::test]
async fn ports_have_two_channels_each_and_begin_with_their_number() {
    let server = Running::start().await;
    let mut client = connect(&server.forward(&[443, 1]), Some("v4.channel.k8s.io")).await;
    client.send(Message::binary(b"\0there and back".as_slice())).await.unwrap();
    let mut heard = <[Vec<u8>; 4]>::default();
    while !heard[0].ends_with(b"back") || !heard[3].ends_with(b"refused") {
        let bytes = timeout(PATIENCE, client.next()).await.unwrap().unwrap().unwrap().into_data();
        heard[usize::from(bytes[0])].extend_from_slice(&bytes[1..]);
    }
    assert_eq!(heard[0], b"\xbb\x01there and back");
    assert_eq!((&*heard[1], &*heard[2]), (&b"\xbb\x01"[..], &b"\x01\0"[..]));
    assert!(heard[3].starts_with(b"\x01\0error forwarding port 1 to pod pod"));
    server.until_sessions(1).await;
    drop(client);
    server.until_sessions(0).await;
}

#[tokio::test]
async fn the_tunnel_is_spdy_in_messages() {
    let server = Running::start().await;
    let mut client = connect(&server.forward(&[]), Some("SPDY/3.1+portforward.k8s.io")).await;
    const PING: [u8; 12] = [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1];
    client.send(Message::binary(&PING[..5])).await.unwrap();
    client.send(Message::binary(&PING[5..])).await.unwrap();
    let back = timeout(PATIENCE, client.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(&back.into_data()[..], PING);
}

#[tokio::test]
async fn both_transports_serve_the_same_server() {
    let server = Running::start().await;
    let websocket = connect(&server.exec("ci", "sleep"), Some("v5.channel.k8s.io")).await;
    let mut spdy = Spdy::connect(&server.exec("ci", "sleep"), "v4.channel.k8s.io").await;
    spdy.open_all(["error", "stdin", "stdout"]).await;
    server.until_sessions(2).await;
    drop((websocket, spdy));
    server.until_sessions(0).await;
}

#[tokio::test]
async fn giant_messages_end_their_session_before_they_are_there() {
    let server = Running::start().await;
    // 2^62 bytes in one frame; 5 MiB in frames of which none is too large.
    let giant = [&[0x82, 0xff][..], &(1_u64 << 62).to_be_bytes(), &[0; 4]].concat();
    let part = [&[0x02, 0xff][..], &(1_u64 << 20).to_be_bytes(), &[0; 4], &[0; 1 << 20]].concat();
    for said in [giant, part.repeat(5)] {
        let mut client = connect(&server.exec("ci", "sleep"), Some("v5.channel.k8s.io")).await;
        // The server may be gone before all is said.
        client.get_mut().write_all(&said).await.ok();
        server.until_sessions(0).await;
    }
    let mut client = connect(&server.exec("io", "both 1"), Some("v5.channel.k8s.io")).await;
    assert_eq!(hear(&mut client).await[1], b"out 0\n");
}
