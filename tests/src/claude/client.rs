//! A plain HTTP client, for tests that speak to a control plane themselves.

use std::net::SocketAddr;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use super::Mock;

/// Sends requests with one credential, each on a connection of its own.
#[derive(Debug, Clone)]
pub struct Client {
    address: SocketAddr,
    /// Headers of each request.
    pub headers: Vec<(String, String)>,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its content type, if it has one.
    pub content_type: Option<String>,
    /// Its `retry-after`, if it has one.
    pub retry_after: Option<String>,
    /// Its body as JSON; null for none, a string for what is not JSON.
    pub body: Value,
}

impl Client {
    /// A client of `mock` that sends this bearer token, as workers do.
    ///
    /// # Panics
    /// Never: the address of a mock is one.
    #[must_use]
    pub fn bearer(mock: &Mock, token: &str) -> Self {
        let address = mock.base_url().trim_start_matches("http://").parse().expect("the address of a mock");
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let headers = vec![
            header("authorization", &format!("Bearer {token}")),
            header("anthropic-version", "2023-06-01"),
            header("anthropic-beta", "managed-agents-2026-04-01"),
        ];
        Self { address, headers }
    }

    /// The same with another header, or with another value of it; an empty one removes it.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(known, _)| known != name);
        if !value.is_empty() {
            self.headers.push((name.to_owned(), value.to_owned()));
        }
        self
    }

    /// Sends a request. `body` null sends none.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn send(&self, method: &str, path: &str, body: &Value) -> anyhow::Result<Answer> {
        let response = self.open(method, path, body).await?;
        let header =
            |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(ToOwned::to_owned);
        let (status, content_type, retry_after) =
            (response.status().as_u16(), header("content-type"), header("retry-after"));
        let bytes = response.into_body().collect().await?.to_bytes();
        let text = || Value::String(String::from_utf8_lossy(&bytes).into_owned());
        let body =
            if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap_or_else(|_| text()) };
        Ok(Answer { status, content_type, retry_after, body })
    }

    /// Sends a request without a body.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.send("GET", path, &Value::Null).await
    }

    /// Posts a value, or nothing for null.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Answer> {
        self.send("POST", path, body).await
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// When it is not answered.
    pub async fn stream(&self, path: &str) -> anyhow::Result<Stream> {
        Ok(Stream { response: self.open("GET", path, &Value::Null).await?, text: String::new() })
    }

    async fn open(&self, method: &str, path: &str, body: &Value) -> anyhow::Result<Response<Incoming>> {
        let connection = TokioIo::new(TcpStream::connect(self.address).await?);
        let (mut sender, driver) = hyper::client::conn::http1::handshake(connection).await?;
        // How it ends shows in the answer.
        tokio::spawn(async move { _ = driver.await });
        let mut request = Request::builder().method(method).uri(path).header("host", "127.0.0.1");
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let bytes = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
        let request = request.header("content-type", "application/json").body(Full::new(bytes))?;
        Ok(sender.send_request(request).await?)
    }
}

/// An open stream, as text.
#[derive(Debug)]
pub struct Stream {
    response: Response<Incoming>,
    text: String,
}

impl Stream {
    /// Everything that has come so far and is not taken.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Takes what has come.
    pub fn take(&mut self) -> String {
        std::mem::take(&mut self.text)
    }

    /// Reads on until `text` is in what has come. False when the stream ends, and an error when it breaks.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn read_until(&mut self, text: &str) -> anyhow::Result<bool> {
        while !self.text.contains(text) {
            match self.response.body_mut().frame().await {
                Some(frame) => {
                    let data = frame?.into_data().unwrap_or_default();
                    self.text.push_str(&String::from_utf8_lossy(&data));
                }
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}
