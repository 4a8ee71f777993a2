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
    history: "History", remove: "Delete", clear: "Delete all", here: "Kept in this browser only: the last 30 chats, fewer where it has no room.",
    small: "A smaller copy of the picture, kept with the chat.", unkept: "This browser has no room to keep the chat.",
    curl: "Copy as curl", python: "Copy as Python", lens: "Nearest words",
    lensHow: "The word nearest to each patch of the picture. Point at one, or use the arrow keys, for more.",
    patch: (row, column) => `row ${row}, column ${column}`, editing: "Editing your last question: Enter sends it, Esc keeps the old one.",
    samples: "Sample questions",
    questions: ["Describe this picture in one sentence.", "What is in the middle of the picture?", "Which colours do you see?", "How many objects are there?"],
  },
  zh: {
    anew: "新对话", drop: "把图片拖到这里", how: "或粘贴，或点击选择文件", choose: "选择图片",
    dialogue: "对话", question: "就图片提问", send: "发送", stop: "停止", copy: "复制", copied: "已复制",
    key: "API 密钥", stopped: "已停止", cut: "已截断：达到最大长度",
    unread: "这个文件不是能读取的图片。", askKey: "服务器需要 API 密钥：填写后再次发送。",
    offline: "服务器没有应答。", broken: "回答中断了。", tokens: (n) => `${n} 个 token`,
    picture: "本次对话的图片", another: "换一张图片，开始新对话",
    history: "历史对话", remove: "删除", clear: "全部删除", here: "只保存在这个浏览器里：最近 30 次对话，空间不足时更少。",
    small: "这是随对话保存的缩小图。", unkept: "浏览器空间不足，没有保存这次对话。",
    curl: "复制为 curl", python: "复制为 Python", lens: "最接近的词",
    lensHow: "每个图块上是与它最接近的词。用鼠标或方向键选一个图块，可以看到更多。",
    patch: (row, column) => `第 ${row} 行第 ${column} 列`, editing: "正在修改上一个问题：Enter 发送，Esc 放弃修改。",
    samples: "示例问题",
    questions: ["用一句话描述这张图片。", "图片中间是什么？", "有哪些颜色？", "一共有几个物体？"],
  },
};
