"use strict";

// The page's words. Elements name theirs: data-text, data-label (for screen readers), data-hint (placeholder).
const WORDS = {
  en: {
    anew: "New chat", drop: "Drop a picture here", how: "or paste it, or press to choose a file", choose: "Choose a picture",
    dialogue: "Dialogue", question: "Ask about the picture", send: "Send", stop: "Stop", copy: "Copy", copied: "Copied",
    key: "API key", stopped: "stopped", cut: "cut: longest answer reached",
    unread: "This file is not an image I can read.", askKey: "This server asks for an API key: enter it, then send again.",
    offline: "The server does not answer.", broken: "The answer broke off.", tokens: (n) => `${n} tokens`,
    picture: "The picture of this dialogue", another: "Choose another picture, for a new chat",
  },
  zh: {
    anew: "新对话", drop: "把图片拖到这里", how: "或粘贴，或点击选择文件", choose: "选择图片",
    dialogue: "对话", question: "就图片提问", send: "发送", stop: "停止", copy: "复制", copied: "已复制",
    key: "API 密钥", stopped: "已停止", cut: "已截断：达到最大长度",
    unread: "这个文件不是能读取的图片。", askKey: "服务器需要 API 密钥：填写后再次发送。",
    offline: "服务器没有应答。", broken: "回答中断了。", tokens: (n) => `${n} 个 token`,
    picture: "本次对话的图片", another: "换一张图片，开始新对话",
  },
};
