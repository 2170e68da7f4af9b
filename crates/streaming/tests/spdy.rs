//! Sessions over SPDY.

mod common;

use a3s_box_streaming::{Config, Server, spdy::Frame};
use common::{Running, Spdy, config, echo};
use std::time::Duration;
use tokio::{io::AsyncWriteExt, time::Instant};

const V4: &str = "v4.channel.k8s.io";

#[tokio::test]
async fn a_command_streams_apart_and_its_end_come_in_order() {
    let server = Running::start().await;
    let mut client = Spdy::connect(&server.exec("io", "both 3"), V4).await;
    let [errors, stdout, stderr] = client.open_all(["error", "stdout", "stderr"]).await;
    let heard = client.hear().await;
    assert_eq!(heard.text(stdout), "out 0\nout 1\nout 2\n");
    assert_eq!(heard.text(stderr), "err 0\nerr 1\nerr 2\n");
    let status: serde_json::Value = serde_json::from_str(&heard.text(errors)).unwrap();
    assert_eq!(status["status"], "Success");
    let mut ended = heard.ended;
    ended.sort_unstable();
    assert_eq!(ended, [errors, stdout, stderr]);
}

#[tokio::test]
async fn old_versions_are_told_failures_in_words() {
    let server = Running::start().await;
    for protocol in ["v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"] {
        for (command, said) in [("exit 0", ""), ("exit 3", "exit code 3"), ("fail", "no such")] {
            let mut client = Spdy::connect(&server.exec("i", command), protocol).await;
            let [errors, _] = client.open_all(["error", "stdout"]).await;
            let text = client.hear().await.text(errors);
            assert!(text.contains(said) && text.is_empty() == said.is_empty(), "{text:?}");
        }
    }
}

#[tokio::test]
async fn the_end_of_stdin_is_not_the_end_of_the_client() {
    let server = Running::start().await;
    let mut client = Spdy::connect(&server.exec("ci", "cat"), V4).await;
    let [_, stdin, stdout] = client.open_all(["error", "stdin", "stdout"]).await;
    client.data(stdin, b"hello").await;
    client.end(stdin).await;
    assert_eq!(client.hear().await.text(stdout), "hello");
    let mut client = Spdy::connect(&server.attach(), V4).await;
    let [_, stdin, stdout] = client.open_all(["error", "stdin", "stdout"]).await;
    client.data(stdin, b"attached").await;
    client.end(stdin).await;
    assert_eq!(client.hear().await.text(stdout), "attached");
}

#[tokio::test]
async fn stdin_nobody_reads_does_not_cost_the_exit_code() {
    let server = Running::start().await;
    for _ in 0..20 {
        let mut client = Spdy::connect(&server.exec("ci", "exit 9"), V4).await;
        let [errors, stdin, _] = client.open_all(["error", "stdin", "stdout"]).await;
        for _ in 0..8 {
            client.data(stdin, &[0; 16 << 10]).await;
        }
        let status = client.hear().await.text(errors);
        assert!(status.contains("\"message\":\"9\""), "{status:?}");
    }
}

#[tokio::test]
async fn the_first_size_is_there_and_the_last_is_never_lost() {
    let server = Running::start().await;
    let mut client = Spdy::connect(&server.exec("ti", "sizes 1"), V4).await;
    let [_, stdout, resize] = client.open_all(["error", "stdout", "resize"]).await;
    client.data(resize, b"{\"Width\":80,").await;
    client.data(resize, b"\"Height\":24}\n").await;
    assert_eq!(client.hear().await.text(stdout), "80x24\n");
    // A backend that looks at no sizes is not disturbed by them.
    let mut client = Spdy::connect(&server.exec("tci", "cat"), V4).await;
    let [_, stdin, stdout, resize] = client.open_all(["error", "stdin", "stdout", "resize"]).await;
    for width in 0..2000 {
        client.data(resize, format!("{{\"Width\":{width},\"Height\":1}}").as_bytes()).await;
    }
    client.data(stdin, b"still here").await;
    client.end(stdin).await;
    assert_eq!(client.hear().await.text(stdout), "still here");
}

#[tokio::test]
async fn a_client_that_vanishes_ends_its_session() {
    let server = Running::start().await;
    let mut client = Spdy::connect(&server.exec("ci", "sleep"), V4).await;
    let [_, stdin, _] = client.open_all(["error", "stdin", "stdout"]).await;
    server.until_sessions(1).await;
    client.data(stdin, b"x").await;
    drop(client);
    server.until_sessions(0).await;
}

#[tokio::test]
async fn a_vanished_client_is_noticed_behind_stdin_that_nobody_takes() {
    let server = Running::start().await;
    let mut client = Spdy::connect(&server.exec("ci", "sleep"), V4).await;
    let [_, stdin, _] = client.open_all(["error", "stdin", "stdout"]).await;
    server.until_sessions(1).await;
    // More pieces than the session holds, of fewer bytes than the kernel does.
    for _ in 0..2000 {
        client.data(stdin, b"x").await;
    }
    drop(client);
    server.until_sessions(0).await;
}

#[tokio::test]
async fn streams_that_do_not_come_and_sessions_that_do_nothing_end() {
    let quick =
        Config { creation: Duration::from_millis(200), idle: Duration::from_secs(1), ..config() };
    let server = Running::with(Server::bind(quick).await.unwrap());
    let mut client = Spdy::connect(&server.exec("ci", "cat"), V4).await;
    client.open_all(["error", "stdout"]).await;
    assert!(client.hear().await.bytes.values().all(Vec::is_empty));
    let mut client = Spdy::connect(&server.exec("ci", "sleep"), V4).await;
    client.open_all(["error", "stdin", "stdout"]).await;
    let begin = Instant::now();
    client.hear().await;
    assert!(begin.elapsed() > Duration::from_millis(900), "{:?}", begin.elapsed());
    server.until_sessions(0).await;
}

#[tokio::test]
async fn a_slow_reader_gets_everything_and_holds_up_no_other_session() {
    const COUNT: usize = 4 << 20;
    let server = Running::start().await;
    let mut slow = Spdy::connect(&server.exec("i", &format!("flood {COUNT}")), V4).await;
    let [_, stdout] = slow.open_all(["error", "stdout"]).await;
    let mut other = Spdy::connect(&server.exec("i", "exit 0"), V4).await;
    other.open_all(["error", "stdout"]).await;
    other.hear().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let heard = slow.hear().await;
    let expected: Vec<u8> = (0..COUNT).map(echo::pattern).collect();
    assert!(heard.bytes[&stdout] == expected);
}

#[tokio::test]
async fn a_client_that_speaks_no_spdy_ends_only_itself() {
    let server = Running::start().await;
    let mut liar = Spdy::connect(&server.exec("ci", "sleep"), V4).await;
    liar.open_all(["error", "stdin", "stdout"]).await;
    let mut other = Spdy::connect(&server.exec("ci", "sleep"), V4).await;
    other.open_all(["error", "stdin", "stdout"]).await;
    server.until_sessions(2).await;
    liar.io.write_all(&[0x80, 2, 0, 1, 0, 0, 0, 0]).await.unwrap();
    liar.hear().await;
    server.until_sessions(1).await;
    other.send(Frame::Ping(1)).await;
    assert_eq!(other.receive().await, Some(Frame::Ping(1)));
}

async fn connection(client: &mut Spdy, port: &str, request: &[(&str, &str)]) -> (u32, u32) {
    let with = |kind| [&[("streamtype", kind), ("port", port)], request].concat();
    let errors = client.open(&with("error")).await;
    client.end(errors).await;
    (errors, client.open(&with("data")).await)
}

#[tokio::test]
async fn connections_to_ports_run_side_by_side() {
    let server = Running::start().await;
    let mut client = Spdy::connect(&server.forward(&[]), "portforward.k8s.io").await;
    let (_, first) = connection(&mut client, "80", &[("requestid", "0")]).await;
    let (_, second) = connection(&mut client, "443", &[("requestid", "1")]).await;
    let (refusal, _) = connection(&mut client, "1", &[("requestid", "2")]).await;
    // Old clients number nothing.
    let (_, third) = connection(&mut client, "80", &[]).await;
    for (id, text) in [(second, "b"), (first, "a"), (third, "c")] {
        client.data(id, text.as_bytes()).await;
        client.end(id).await;
    }
    let (mut said, mut ended) = (String::new(), 0);
    while ended < 8 {
        match client.receive().await.unwrap() {
            Frame::Data { id, flags, bytes } => {
                let text = std::str::from_utf8(&bytes).unwrap();
                if id == refusal {
                    assert!(text.is_empty() || text.contains("connection refused"), "{text}");
                }
                if !text.is_empty() {
                    said.push_str(if id == refusal { "!" } else { text });
                }
                ended += usize::from(flags & 1);
            }
            Frame::RstStream { .. } => ended += 1,
            _ => {}
        }
    }
    let mut said: Vec<_> = said.chars().collect();
    said.sort_unstable();
    assert_eq!(said, ['!', 'a', 'b', 'c']);
    server.until_sessions(0).await;
}

#[tokio::test]
async fn a_connection_the_client_gives_up_ends_and_so_do_all_when_it_goes() {
    let server = Running::start().await;
    let mut client = Spdy::connect(&server.forward(&[]), "portforward.k8s.io").await;
    let silent = echo::SILENT.to_string();
    let (_, first) = connection(&mut client, &silent, &[("requestid", "0")]).await;
    connection(&mut client, &silent, &[("requestid", "1")]).await;
    server.until_sessions(2).await;
    client.send(Frame::RstStream { id: first, status: 5 }).await;
    server.until_sessions(1).await;
    drop(client);
    server.until_sessions(0).await;
}

#[tokio::test]
async fn only_ports_that_were_asked_for_are_reached() {
    let server = Running::start().await;
    let mut client = Spdy::connect(&server.forward(&[80]), "portforward.k8s.io").await;
    for port in ["443", "0", "65536", "http", ""] {
        let id = client.open(&[("streamtype", "data"), ("port", port)]).await;
        let reset = loop {
            match client.receive().await {
                Some(Frame::RstStream { id, .. }) => break id,
                Some(_) => {}
                None => panic!("the connection ended at port {port:?}"),
            }
        };
        assert_eq!(reset, id, "{port:?}");
    }
}
