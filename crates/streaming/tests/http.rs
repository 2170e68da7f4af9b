//! What the server answers before any session.

mod common;

use a3s_box_streaming::{Config, Server};
use common::{Running, ask, code, config, split};

const SPDY: [&str; 3] =
    ["Connection: Upgrade", "Upgrade: SPDY/3.1", "X-Stream-Protocol-Version: v4.channel.k8s.io"];

#[tokio::test]
async fn a_token_works_once_and_others_never() {
    let server = Running::start().await;
    let url = server.exec("i", "sleep");
    let (head, _session) = ask(&url, "POST", &SPDY).await;
    assert_eq!(code(&head), 101);
    assert!(head.to_lowercase().contains("x-stream-protocol-version: v4.channel.k8s.io"), "{head}");
    assert_eq!(code(&ask(&url, "POST", &SPDY).await.0), 404);
    let wrong = format!("{}x", &url[..url.len() - 1]);
    assert_eq!(code(&ask(&wrong, "POST", &SPDY).await.0), 404);
    let other = server.exec("i", "sleep").replace("/exec/", "/attach/");
    assert_eq!(code(&ask(&other, "POST", &SPDY).await.0), 404);
}

#[tokio::test]
async fn other_paths_and_methods_are_refused_and_cost_no_token() {
    let server = Running::start().await;
    let url = server.exec("i", "exit 0");
    let (host, path) = split(&url);
    for path in ["/", "/exec", "/exec/", "/execute/x", &format!("{path}/x"), &format!("/x{path}")] {
        let (head, _) = ask(&format!("http://{host}{path}"), "GET", &SPDY).await;
        assert_eq!(code(&head), 404, "{path}");
    }
    for method in ["PUT", "DELETE", "OPTIONS", "HEAD"] {
        let (head, _) = ask(&url, method, &SPDY).await;
        assert_eq!(code(&head), 405, "{method}");
        assert!(head.to_lowercase().contains("allow: get, post"), "{head}");
    }
    assert_eq!(code(&ask(&url, "GET", &SPDY).await.0), 101);
}

#[tokio::test]
async fn without_a_protocol_in_common_nothing_begins() {
    let server = Running::start().await;
    let no_upgrade = ask(&server.exec("i", "sleep"), "GET", &[]).await.0;
    assert_eq!(code(&no_upgrade), 400);
    assert_eq!(code(&ask(&server.exec("i", "sleep"), "POST", &SPDY[..2]).await.0), 400);
    let v9 = [SPDY[0], SPDY[1], "X-Stream-Protocol-Version: v9.channel.k8s.io"];
    let (head, _) = ask(&server.exec("i", "sleep"), "POST", &v9).await;
    assert_eq!(code(&head), 403);
    assert_eq!(head.to_lowercase().matches("x-accepted-stream-protocol-versions").count(), 4);
    let websocket = [
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol: v9.channel.k8s.io",
    ];
    assert_eq!(code(&ask(&server.exec("i", "sleep"), "GET", &websocket).await.0), 403);
    assert_eq!(code(&ask(&server.forward(&[]), "GET", &websocket[..4]).await.0), 400);
    assert_eq!(server.sessions(), 0);
}

#[tokio::test]
async fn urls_begin_with_what_is_advertised() {
    let advertised = Some("https://node.example:10010/cri/".to_owned());
    let server = Server::bind(Config { advertised, ..config() }).await.unwrap();
    let url = Running::with(server).exec("i", "sleep");
    assert!(url.starts_with("https://node.example:10010/cri/exec/"), "{url}");
}
